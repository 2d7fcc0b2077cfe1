"""Everything that touches MLX. Importing this package prepares MLX, before any of its modules uses it.

On a Linux CPU that means a fast BLAS, an allocator that keeps its memory, and no `mx.compile`: there it calls a C++
compiler at run time, which a bare machine lacks and which takes longer than it saves on runs of minutes.
"""

import sys

from mlx_distill.backends.mlx import allocator, blas

blas.load()

import mlx.core as mx  # noqa: E402 - the BLAS must be there first

if sys.platform == "linux" and mx.default_device() == mx.cpu:
    allocator.keep_freed_memory()
    mx.disable_compile()
