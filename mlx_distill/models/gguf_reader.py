"""Opens a GGUF file and gives its metadata and tensors in plain types, or says why that cannot be.

The head is parsed here rather than by the `gguf` package, whose reader believes every count a file states: a cut or
hostile file can keep it busy for ever. Its dequantisation is used. Format: GGUF 2 and 3, little-endian
(ggml's docs/gguf.md). Does not read models that are split over several files.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from mlx_distill.errors import InputError, ModelError

T = TypeVar("T")

_REQUIRED: Any = object()

#: Metadata value types by number; 8 is a string and 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9

_MAX_DIMENSIONS = 4

_OTHER_QUANTISATION = "Use a GGUF of another quantisation, such as Q8_0, Q4_K_M or F16."


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as it lies in the file.

    Attributes:
        name: In llama.cpp's naming.
        type: Name of its GGML type, such as "Q4_1".
        shape: Rows first, as numpy and safetensors have it (the file has it reversed).
        raw: Its bytes, mapped from the file, (rows, bytes a row).
    """

    name: str
    type: str
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]

    def values(self) -> NDArray[np.float32]:
        """Its values in float32, in `shape`.

        Raises:
            ModelError: Its type is one that cannot be dequantised.
        """
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        try:
            values: NDArray[np.float32] = dequantize(self.raw, GGMLQuantizationType[self.type])
        except NotImplementedError:
            raise ModelError(
                f"tensor {self.name} has the type {self.type}, which cannot be dequantised.", hint=_OTHER_QUANTISATION
            ) from None
        return values.reshape(self.shape)


@dataclass(frozen=True)
class GgufFile:
    """Metadata and tensors of a GGUF file."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """Such as "llama" or "qwen2"."""
        return self.get("general.architecture", str)

    def get(self, key: str, kind: type[T], default: Any = _REQUIRED) -> T:
        """A metadata value; an `int` is taken where a `float` is asked.

        Args:
            default: Returned where the file lacks the key, whatever its type.

        Raises:
            ModelError: The key is missing and has no default, or its value is of another type.
        """
        value = self.metadata.get(key)
        if value is None:
            if default is _REQUIRED:
                raise ModelError(
                    f"{self.path} has no {key} in its metadata.", hint="Convert it anew with a current llama.cpp."
                )
            return default  # type: ignore[no-any-return]
        if kind is float and isinstance(value, int):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelError(f"{self.path}: {key} is a {type(value).__name__}, not a {kind.__name__}.")
        return value

    def hyper(self, key: str, kind: type[T], default: Any = _REQUIRED) -> T:
        """A metadata value of the architecture, such as "block_count" for "llama.block_count"."""
        return self.get(f"{self.architecture}.{key}", kind, default)


def read_gguf(path: Path) -> GgufFile:
    """Open a GGUF file. Tensors are mapped, not read.

    Raises:
        InputError: There is no such file, or it is not a whole GGUF file.
        ModelError: It is one part of several, or a tensor has a type that is not known.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, IsADirectoryError):
        raise InputError("no such file.", path=path) from None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read ({error}).", path=path) from None
    try:
        source = _parse(path, mapped)
    except _BrokenError as error:
        raise InputError(
            f"not a whole GGUF file ({error}).", path=path, hint="Download or copy it again; it may have been cut."
        ) from None
    parts = source.metadata.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise ModelError(
            f"{path} is one part of a model split over {parts} files.",
            hint=f"Join them first:  llama-gguf-split --merge {path.name} whole.gguf",
        )
    return source


class _BrokenError(Exception):
    """The bytes are not those of a GGUF file."""


class _Cursor:
    """Reads a file's head piece by piece, never past its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise _BrokenError(f"it ends at byte {len(self.data)}, inside its head")
        self.at += count
        return self.data[self.at - count : self.at]

    def numbers(self, code: str, count: int = 1) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{code}")
        if count > (len(self.data) - self.at) // size:
            raise _BrokenError(f"it ends at byte {len(self.data)}, inside its head")
        return struct.unpack(f"<{count}{code}", self.take(count * size))

    def string(self) -> str:
        try:
            return self.take(self.numbers("Q")[0]).decode()
        except UnicodeDecodeError:
            raise _BrokenError(f"a string before byte {self.at} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            (inner,) = self.numbers("I")
            (count,) = self.numbers("Q")
            if inner == _STRING:
                return [self.string() for _ in range(count)]
            return list(self.numbers(self._code(inner), count))
        return self.numbers(self._code(kind))[0]

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise _BrokenError(f"a value before byte {self.at} has the unknown type {kind}")
        return _SCALARS[kind]


def _parse(path: Path, data: mmap.mmap) -> GgufFile:
    cursor = _Cursor(data)
    if cursor.take(4) != b"GGUF":
        raise _BrokenError("it does not begin with GGUF")
    (version,) = cursor.numbers("I")
    if version not in (2, 3):
        raise _BrokenError(f"version {version}; 2 and 3 are known")
    tensor_count, value_count = cursor.numbers("Q", 2)
    metadata: dict[str, Any] = {}
    for _ in range(value_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.numbers("I")[0])
    heads = [_tensor_head(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise _BrokenError(f"its alignment is {alignment}")
    start = -(-cursor.at // alignment) * alignment
    whole = np.frombuffer(data, dtype=np.uint8)
    tensors = {head.name: _tensor(path, whole, start, head) for head in heads}
    return GgufFile(path, metadata, tensors)


@dataclass(frozen=True)
class _TensorHead:
    name: str
    shape: tuple[int, ...]
    type_number: int
    offset: int


def _tensor_head(cursor: _Cursor) -> _TensorHead:
    name = cursor.string()
    (dimensions,) = cursor.numbers("I")
    if dimensions > _MAX_DIMENSIONS:
        raise _BrokenError(f"tensor {name} has {dimensions} dimensions")
    shape = cursor.numbers("Q", dimensions)[::-1]
    return _TensorHead(name, shape, cursor.numbers("I")[0], cursor.numbers("Q")[0])


def _tensor(path: Path, whole: NDArray[np.uint8], start: int, head: _TensorHead) -> GgufTensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        type_ = GGMLQuantizationType(head.type_number)
    except ValueError:
        raise ModelError(
            f"{path}: tensor {head.name} has the type {head.type_number}, which is not known.", hint=_OTHER_QUANTISATION
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[type_]
    columns = head.shape[-1] if head.shape else 1
    if columns % block:
        raise _BrokenError(f"tensor {head.name} has rows of {columns}, which {type_.name} cannot pack")
    row = columns // block * block_bytes
    rows = math.prod(head.shape[:-1])
    begin = start + head.offset
    end = begin + rows * row
    if end > whole.size:
        raise _BrokenError(f"it ends at byte {whole.size}, and tensor {head.name} at {end}")
    return GgufTensor(head.name, type_.name, head.shape, whole[begin:end].reshape(rows, row))
