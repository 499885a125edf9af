"""The exact error of serving one adapter for another, from the files."""
