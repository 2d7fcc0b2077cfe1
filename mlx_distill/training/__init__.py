"""The one training loop, over any backend."""
