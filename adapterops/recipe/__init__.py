"""Recipes: calls of verbs written down, in YAML or in the provenance of what a verb has made."""
