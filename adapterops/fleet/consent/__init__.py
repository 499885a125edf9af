"""What tenants agreed to: whose weights may serve whom."""
