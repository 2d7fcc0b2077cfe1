"""mlx-distill: a small model learns from a big one, on one Mac."""

__version__ = "0.1.0"
