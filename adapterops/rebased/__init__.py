"""Adapters that are relative to their base model become ordinary ones when the base is given."""
