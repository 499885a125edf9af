"""Who the tenants are, and which files are theirs."""
