"""The way back from a baked model: what restores its base bit by bit."""
