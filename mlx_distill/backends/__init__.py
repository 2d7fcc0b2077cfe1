"""What computes: one folder a backend."""
