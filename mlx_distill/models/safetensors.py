"""Writes a safetensors file tensor by tensor, so that a model is never whole in memory.

Does not read such files, and does not shard them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

#: Element types by their name in the file. numpy has no bfloat16: its bits travel as uint16.
StorageType = Literal["F32", "F16", "BF16"]

NUMPY_TYPES: Mapping[StorageType, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that will be written: what the head of the file says of it."""

    name: str
    shape: tuple[int, ...]
    type: StorageType

    @property
    def bytes(self) -> int:
        """Size of its data."""
        return math.prod(self.shape) * NUMPY_TYPES[self.type].itemsize


def write_safetensors(path: Path, specs: Sequence[TensorSpec], data: Iterable[NDArray[Any]]) -> None:
    """Write the tensors in the order of `specs`, each as it is yielded.

    Args:
        specs: All tensors of the file; `data` must fit them one for one.
        data: Arrays of the numpy type that stands for the spec's type.

    Raises:
        ValueError: An array's shape or type is not what its spec says, or their number differs.
    """
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for spec in specs:
        head[spec.name] = {"dtype": spec.type, "shape": list(spec.shape), "data_offsets": [at, at + spec.bytes]}
        at += spec.bytes
    encoded = json.dumps(head).encode()
    encoded += b" " * (-len(encoded) % 8)  # readers want the data aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for spec, array in zip(specs, data, strict=True):
            if array.shape != spec.shape or array.dtype != NUMPY_TYPES[spec.type]:
                raise ValueError(f"{spec.name}: {array.dtype} {array.shape} is not {spec.type} {spec.shape}")
            file.write(np.ascontiguousarray(array).data)


def to_storage(values: NDArray[np.float32], kind: StorageType) -> NDArray[Any]:
    """Round float32 values to a storage type, to nearest, ties to even.

    Returns:
        Of the numpy type of `NUMPY_TYPES[kind]`, in the same shape.

    Raises:
        OverflowError: A finite value lies beyond the type's range.
    """
    if kind == "F32":
        return values.astype(np.float32, copy=False)
    if kind == "F16":
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if np.isinf(halves).any() and not np.isinf(values).any():
            raise OverflowError(f"{np.abs(values).max():g} does not fit in float16")
        return halves
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype(np.uint16)
