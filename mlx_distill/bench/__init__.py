"""`bench`: what each backend is worth on this machine, on the very same batches."""
