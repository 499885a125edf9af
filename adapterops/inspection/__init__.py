"""What an adapter is: its description from headers, its spectrum from tensors."""
