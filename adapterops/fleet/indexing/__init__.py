"""A fleet's index on disk: made, resumed, merged, read."""
