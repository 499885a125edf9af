"""Adapters that a merge method makes of others, computed when they are read, module by module."""
