"""Fleets: many tenants' adapters on one base, which of them can share one, and what that costs."""
