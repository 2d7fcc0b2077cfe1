"""Reads the weights of an adapter: a safetensors file that is small enough to be held whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from mlx_distill.errors import InputError

#: Element types that float32 holds to the bit.
_TYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}


def read_tensors(path: Path) -> tuple[dict[str, NDArray[np.float32]], dict[str, str]]:
    """All tensors of a file, as float32, and its metadata.

    Raises:
        InputError: It is missing, damaged, or holds other numbers than floats of at most 32 bits.
    """
    try:
        content = path.read_bytes()
        entries: list[tuple[str, dict[str, Any]]] = deserialize(content)  # type: ignore[no-untyped-call]
        head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except FileNotFoundError:
        raise InputError("no such file.", path=path) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}.", path=path) from None
    except (SafetensorError, ValueError) as error:
        raise InputError(
            f"not a whole safetensors file ({error}).", path=path, hint="Copy or download it again."
        ) from None
    tensors = {}
    for name, entry in entries:
        kind = _TYPES.get(entry["dtype"])
        if kind is None:
            raise InputError(f"{name} is of type {entry['dtype']}; an adapter is of F32, F16 or BF16.", path=path)
        values = np.frombuffer(entry["data"], kind).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            # numpy has no bfloat16: it is the upper half of a float32.
            values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
        tensors[name] = values.astype(np.float32)
    return tensors, head.get("__metadata__", {})


def require_finite(tensors: dict[str, NDArray[np.float32]], path: Path) -> None:
    """Refuse an adapter that holds what is no number.

    Raises:
        InputError: Names the first such tensor.
    """
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            raise InputError(f"{name} holds values that are no numbers.", path=path, hint="Take an earlier adapter.")
