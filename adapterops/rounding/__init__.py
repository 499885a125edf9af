"""Rounding a sum of a stored weight and a change: exactly, at random, or with feedback."""
