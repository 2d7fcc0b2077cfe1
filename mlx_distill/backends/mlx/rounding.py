"""Round matrices without losing what is small: up or down by chance, in proportion to how near either is.

Rounding to the nearest loses every change that is less than half a step of the type, in all weights alike, and most of
what an adapter changes is that small beside bfloat16's steps of 2⁻⁸. Rounded by chance, a weight is right on average,
so that errors cancel out in a product's sum instead of adding up (stochastic rounding).
"""

from __future__ import annotations

import hashlib

import mlx.core as mx

#: Bits of the significand after the leading one, and the exponent of the smallest normal number.
_FORMATS = {mx.bfloat16: (7, -126), mx.float16: (10, -14)}

#: Of float32's exponent.
_BIAS = 127


def rounded(values: mx.array, dtype: mx.Dtype, key: mx.array) -> mx.array:
    """Round to one of the two neighbours in a type, so that the expected value is the value.

    What the type can hold stays as it is, with its sign, and so does what is not finite. What is beyond the type's
    range becomes infinite, as it does elsewhere.

    Args:
        values: float32.
        dtype: bfloat16 or float16; any other rounds to the nearest.
        key: Of `mx.random.key`. The same key gives the same rounding.
    """
    if dtype not in _FORMATS:
        return values.astype(dtype)
    bits, smallest = _FORMATS[dtype]
    exponent = ((values.view(mx.uint32) >> 23) & 0xFF).astype(mx.int32) - _BIAS
    # A step between neighbours is a power of two, so that dividing by it is exact.
    step = ((mx.maximum(exponent, max(smallest, bits - 126)) - bits + _BIAS) << 23).astype(mx.uint32).view(mx.float32)
    finer = 23 - bits
    # As many bits as the sum of a value in steps and the chance can hold: whole steps stay whole.
    chance = mx.random.randint(0, 2**finer, values.shape, key=key).astype(mx.float32) * 2.0**-finer
    chosen = mx.floor(mx.abs(values) / step + chance) * step
    stays = (values == 0) | ~mx.isfinite(values)
    return mx.where(stays, values, mx.where(values < 0, -chosen, chosen)).astype(dtype)


def key_of(name: str, row: int) -> mx.array:
    """A random key that is a matrix's own, from some row on: the same adapter gives the same fused model."""
    digest = hashlib.sha256(f"{name}\n{row}".encode()).digest()
    return mx.random.key(int.from_bytes(digest[:8], "big"))
