"""What is kept of an adapter: sketches, norms, ranks, hashes, from one pass over its bytes."""
