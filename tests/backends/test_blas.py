"""The fast BLAS under MLX on Linux: really used, never in the way. Each case in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

linux = pytest.mark.skipif(sys.platform != "linux", reason="a Mac has Accelerate")

#: The product against numpy's, in float32 and at sizes that no kernel divides evenly.
PRODUCT = """
import mlx.core as mx, numpy as np
g = np.random.default_rng(0)
for shape in [(1, 1, 1), (3, 17, 5), (64, 64, 64), (129, 257, 65)]:
    a = g.standard_normal(shape[:2]).astype("float32"); b = g.standard_normal(shape[1:]).astype("float32")
    for left, right in ((mx.array(a), mx.array(b)), (mx.array(a.T).T, mx.array(b.T).T)):
        np.testing.assert_allclose(np.array(left @ right), a.astype("float64") @ b, rtol=1e-4, atol=1e-4)
print("right")
"""


def python(code: str, **environment: str) -> list[str]:
    """Lines that a fresh interpreter prints."""
    kept = {key: value for key, value in os.environ.items() if key != "MLX_DISTILL_BLAS"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@linux
def test_a_library_is_loaded_before_mlx_and_serves_its_products() -> None:
    """The address of `cblas_sgemm` that MLX's library is linked to is that of the library loaded."""
    code = """
import ctypes
from mlx_distill.backends.mlx import blas
def address(library):
    return ctypes.cast(library.cblas_sgemm, ctypes.c_void_p).value
print(address(ctypes.CDLL(None)) == address(ctypes.CDLL(blas.loaded())))
print("openblas" in blas.loaded().lower(), "OpenBLAS" in blas.describe(), blas.load() == blas.loaded())
"""
    assert python(code + PRODUCT) == ["True", "True True True", "right"]


@linux
@pytest.mark.parametrize("value", ["off", "/nowhere/libopenblas.so", __file__])
def test_without_a_library_mlx_uses_its_own(value: str) -> None:
    code = "from mlx_distill.backends.mlx import blas\nprint(blas.loaded(), 'reference' in blas.describe())\n"
    assert python(code + PRODUCT, MLX_DISTILL_BLAS=value) == ["None True", "right"]


@linux
def test_a_named_library_is_taken() -> None:
    (path,) = python("from mlx_distill.backends.mlx import blas\nprint(blas.loaded())")
    code = "from mlx_distill.backends.mlx import blas\nprint(blas.loaded())"
    assert python(code, MLX_DISTILL_BLAS=path) == [path]


@linux
def test_it_is_not_loaded_after_mlx() -> None:
    """Then it would serve nothing, and to say that it does would be wrong."""
    code = "import mlx.core\nfrom mlx_distill.backends.mlx import blas\nprint(blas.load(), blas.loaded())"
    assert python(code) == ["None None"]


@linux
def test_it_is_faster_than_mlxs_own() -> None:
    code = "from mlx_distill.backends.mlx.device import measure_matmul\nprint(measure_matmul(512, seconds=0.3))"
    fast, slow = (float(python(code, **extra)[0]) for extra in ({}, {"MLX_DISTILL_BLAS": "off"}))
    assert fast > 2 * slow


def test_the_command_line_does_not_load_it_for_help() -> None:
    code = "import sys, mlx_distill.cli.main\nprint('mlx.core' in sys.modules, 'numpy' in sys.modules)"
    assert python(code) == ["False False"]
