"""Several methods on the same records."""
