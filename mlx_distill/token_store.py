"""Tokenised rows as flat arrays, in files that are mapped into memory or in memory itself.

A store is a folder:

    tokens.bin   the tokens of all rows, one after the other: uint16, or int32 for a large vocabulary
    mask.bin     one bit a token, True where it carries loss; each row begins a byte
    index.bin    a record a row: tokens, tokens that carry loss, line in the data file
    header.json  counts, and size and SHA-256 of the three

All numbers are little-endian. A store holds every row of its file, also those too long to train on: what is left out
is decided on reading. Nothing of a store is believed before all of it has been checked.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from mlx_distill.batches import TokenRow
from mlx_distill.layout import explain
from mlx_distill.records import Record

#: Raised when what a store holds, or the way in which rows become tokens, changes.
STORE_FORMAT: Final = 1

HEADER = "header.json"
_TOKENS, _MASK, _INDEX = FILES = ("tokens.bin", "mask.bin", "index.bin")

_INDEX_TYPE = np.dtype([("tokens", "<i4"), ("target_tokens", "<i4"), ("line", "<i8")])

TokenType = Literal["<u2", "<i4"]


class StoreError(Exception):
    """A folder is not a whole store, or not the one that was looked for."""


class StoreFile(Record):
    """One file of a store."""

    bytes: int
    sha256: str


class StoreHeader(Record):
    """`header.json` of a store.

    Attributes:
        key: What it was made from, as a hash.
        dtype: Of a token.
    """

    format: Literal[1] = STORE_FORMAT
    key: str
    dtype: TokenType
    rows: int
    tokens: int
    target_tokens: int
    files: dict[str, StoreFile]


class StoredRows(Sequence[TokenRow]):
    """Some rows of a store, read one at a time.

    Args:
        store: Where they are.
        which: Their numbers in it: (n,) integers.
    """

    def __init__(self, store: TokenStore, which: NDArray[np.int64]) -> None:
        self._store = store
        self._which = which

    def __len__(self) -> int:
        return len(self._which)

    @overload
    def __getitem__(self, index: int) -> TokenRow: ...

    @overload
    def __getitem__(self, index: slice) -> StoredRows: ...

    def __getitem__(self, index: int | slice) -> TokenRow | StoredRows:
        if isinstance(index, slice):
            return StoredRows(self._store, self._which[index])
        return self._store.row(int(self._which[index]))


@dataclass(frozen=True)
class TokenStore:
    """Every tokenised row of a file.

    Attributes:
        tokens: Of all rows: (N,), uint16 or int32, perhaps mapped from a file.
        mask: Their loss masks: bits, each row from a byte of its own.
        index: (rows,) records of `tokens`, `target_tokens` and `line`.
        token_starts: (rows,) where each row begins in `tokens`.
        mask_starts: (rows,) where each row begins in `mask`.
    """

    tokens: NDArray[np.uint16 | np.int32]
    mask: NDArray[np.uint8]
    index: NDArray[np.void]
    token_starts: NDArray[np.int64]
    mask_starts: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def lengths(self) -> NDArray[np.int32]:
        """(rows,) tokens of each row."""
        lengths: NDArray[np.int32] = self.index["tokens"]
        return lengths

    def row(self, number: int) -> TokenRow:
        """A copy of one row."""
        length = int(self.index["tokens"][number])
        at, mask_at = int(self.token_starts[number]), int(self.mask_starts[number])
        bits = np.unpackbits(self.mask[mask_at : mask_at + _bytes_of_bits(length)], count=length)
        return TokenRow(np.array(self.tokens[at : at + length], dtype=np.int32), bits.view(np.bool_))


class StoreWriter:
    """Writes a store, a row at a time.

    Args:
        files: Open files for tokens, mask and index.
        dtype: Of a token.
    """

    def __init__(self, files: Mapping[str, BinaryIO], dtype: TokenType) -> None:
        self._files = files
        self._dtype = np.dtype(dtype)
        self._digests = {name: hashlib.sha256() for name in FILES}
        self._bytes = dict.fromkeys(FILES, 0)
        self._rows = self._tokens = self._target_tokens = 0

    def add(self, line: int, row: TokenRow) -> None:
        """Append a row.

        Raises:
            OSError: It cannot be written, as on a full disk.
        """
        record = np.array((len(row.tokens), row.target_tokens, line), dtype=_INDEX_TYPE)
        self._write(_TOKENS, row.tokens.astype(self._dtype).tobytes())
        self._write(_MASK, np.packbits(row.loss_mask).tobytes())
        self._write(_INDEX, record.tobytes())
        self._rows += 1
        self._tokens += len(row.tokens)
        self._target_tokens += row.target_tokens

    def finish(self, *, key: str) -> StoreHeader:
        """Flush the files; what was written, as the header states it.

        Raises:
            OSError: It cannot be written.
        """
        for file in self._files.values():
            file.flush()
        return StoreHeader(
            key=key,
            dtype="<u2" if self._dtype.itemsize == 2 else "<i4",
            rows=self._rows,
            tokens=self._tokens,
            target_tokens=self._target_tokens,
            files={name: StoreFile(bytes=self._bytes[name], sha256=self._digests[name].hexdigest()) for name in FILES},
        )

    def _write(self, name: str, content: bytes) -> None:
        self._files[name].write(content)
        self._digests[name].update(content)
        self._bytes[name] += len(content)


@contextmanager
def store_files(folder: Path) -> Iterator[Mapping[str, BinaryIO]]:
    """The files of a store to be written into an empty folder."""
    with ExitStack() as stack:
        yield {name: stack.enter_context((folder / name).open("wb")) for name in FILES}


def memory_files() -> Mapping[str, BinaryIO]:
    """Files in memory, to write a small store into."""
    return {name: io.BytesIO() for name in FILES}


def open_store(folder: Path, *, key: str) -> TokenStore:
    """Open the store in a folder, and check all of it.

    Args:
        key: What it must have been made from.

    Raises:
        FileNotFoundError: There is no store.
        StoreError: It is damaged, or another's.
    """
    try:
        header = StoreHeader.model_validate_json((folder / HEADER).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(folder) from None
    except ValidationError as error:
        raise StoreError(f"{HEADER}: {explain(error)}") from None
    except OSError as error:
        raise StoreError(f"{HEADER}: {error.strerror}") from None
    if header.key != key:
        raise StoreError("it was made from something else")
    try:
        with ExitStack() as stack:
            # Checked and mapped by one handle: what is used is what was checked, whoever replaces the folder meanwhile.
            files = {name: stack.enter_context((folder / name).open("rb")) for name in FILES}
            for name, file in files.items():
                _check_file(name, file, header)
            return map_store(files, header)
    except OSError as error:
        raise StoreError(str(error.strerror)) from None


def _check_file(name: str, file: io.BufferedReader, header: StoreHeader) -> None:
    size = file.seek(0, io.SEEK_END)
    if name not in header.files:
        raise StoreError(f"{HEADER}: nothing about {name}")
    if size != header.files[name].bytes:
        raise StoreError(f"{name} has {size} bytes instead of {header.files[name].bytes}")
    file.seek(0)
    if hashlib.file_digest(file, "sha256").hexdigest() != header.files[name].sha256:
        raise StoreError(f"the content of {name} was changed")


def map_store(files: Mapping[str, BinaryIO], header: StoreHeader) -> TokenStore:
    """The store in these files; they may be closed, and even removed, afterwards.

    Args:
        files: By name; on disk (these are mapped into memory) or in memory.
        header: What they hold.

    Raises:
        StoreError: They hold something else.
    """
    index = _mapped(files[_INDEX], _INDEX_TYPE)
    tokens, mask = _mapped(files[_TOKENS], np.dtype(header.dtype)), _mapped(files[_MASK], np.dtype(np.uint8))
    lengths: NDArray[np.int64] = index["tokens"].astype(np.int64)
    sizes = _bytes_of_bits(lengths)
    found = (len(index), int(lengths.sum()), int(index["target_tokens"].sum(dtype=np.int64)))
    if found != (header.rows, header.tokens, header.target_tokens) or (lengths < 0).any():
        raise StoreError(f"{HEADER} and {_INDEX} do not agree")
    if (len(tokens), len(mask)) != (header.tokens, int(sizes.sum())):
        raise StoreError(f"{_INDEX} and the tokens do not agree")
    return TokenStore(tokens, mask, index, np.cumsum(lengths) - lengths, np.cumsum(sizes) - sizes)


def _mapped(file: BinaryIO, dtype: np.dtype[Any]) -> NDArray[Any]:
    if isinstance(file, io.BytesIO):
        return np.frombuffer(file.getbuffer(), dtype=dtype)
    size = file.seek(0, io.SEEK_END)
    if size % dtype.itemsize:
        raise StoreError(f"a file ends within a number of {dtype.itemsize} bytes")
    if size == 0:
        return np.empty(0, dtype=dtype)
    # A plain array over the map: numpy's own class of them makes every slice slower.
    return np.memmap(file, dtype=dtype, mode="r").view(np.ndarray)


@overload
def _bytes_of_bits(bits: int) -> int: ...


@overload
def _bytes_of_bits(bits: NDArray[np.int64]) -> NDArray[np.int64]: ...


def _bytes_of_bits(bits: int | NDArray[np.int64]) -> int | NDArray[np.int64]:
    return (bits + 7) // 8
