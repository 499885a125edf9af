"""A plan: what serves whom, on disk, beside another, summed up."""
