"""What `analyze` does between its options and its report: adapters looked at before a merge."""
