"""What serves a group: an original, a mean or a minimax adapter."""
