"""What adapters change in a base model: which stored tensor gets what, from headers and configs."""
