"""A whole plan from an index."""
