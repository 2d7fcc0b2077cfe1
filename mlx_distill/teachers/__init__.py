"""Teachers, one a file, and the registry that opens one by its spec."""
