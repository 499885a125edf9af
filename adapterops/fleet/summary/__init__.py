"""A plan summed up for people."""
