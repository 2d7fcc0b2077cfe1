"""What gives a process that is not ours the BLAS that ours has."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

_BACKEND = Path(__file__).resolve().parents[2] / "mlx_distill" / "backends" / "mlx"


def load_blas(*, allocator: bool = False) -> str:
    """Load the BLAS, and on request set the allocator, before MLX is imported.

    The two modules are read by their path: importing their package would also turn `mx.compile` off.

    Returns:
        The BLAS, in words.
    """
    blas = _module("blas")
    blas.load()
    if allocator:
        _module("allocator").keep_freed_memory()
    return str(blas.describe())


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"_bench_{name}", _BACKEND / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
