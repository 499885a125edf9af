"""Planning of an extraction: what differs between two checkpoints, and what becomes of it."""
