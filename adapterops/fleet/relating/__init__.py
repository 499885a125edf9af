"""Tenants that resemble each other more than the fleet does by itself."""
