"""Tenants that come, change and go while the plan stays what it is."""
