"""What `diff` does between its options and its report: modules compared, totals, a verdict."""
