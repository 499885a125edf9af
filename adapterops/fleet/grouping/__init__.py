"""From sketches to groups whose every error is verified."""
