"""Adapters added to the weights of their base model, in its own files and type."""
