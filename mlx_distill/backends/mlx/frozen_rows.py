"""What the frozen lower part of a student gives, computed once a row and kept.

With LoRA on the last k layers, everything below them is the same in every epoch and every evaluation. It is computed
row by row, each row at its own width whether or not it is kept, so the losses are the same to the bit either way.
"""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_distill.backends.mlx.trunk import Trunk
from mlx_distill.batches import Batch, padded_width


class Store(Protocol):
    """Keeps arrays by key while there is room."""

    def get(self, key: bytes) -> mx.array | None:
        """What was kept, or None."""
        ...

    def keep(self, key: bytes, value: mx.array) -> None:
        """Keep an evaluated array, unless it does not fit."""
        ...


class InMemory:
    """Keeps arrays as they are.

    Args:
        room: Bytes that they may take.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._kept: dict[bytes, mx.array] = {}

    def get(self, key: bytes) -> mx.array | None:
        """See `Store`."""
        return self._kept.get(key)

    def keep(self, key: bytes, value: mx.array) -> None:
        """See `Store`."""
        if value.nbytes <= self._room:
            self._room -= value.nbytes
            self._kept[key] = value


class OnDisk:
    """Keeps arrays one after the other in a file that has no name and so goes with the process, however that ends.

    The file is read and not mapped: pages of a map would count as this process's memory, which is what is to be saved;
    the system keeps what it has room for all the same.

    Args:
        room: Bytes that they may take. A disk that fills before ends the keeping, not the training: what was kept is
            given back, as a checkpoint needs the space more.
        folder: On the disk to use.
    """

    def __init__(self, room: int, folder: Path) -> None:
        self._room = room
        # Unbuffered: what a write could not finish must show there and then.
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder, prefix="frozen-rows-", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._end = 0
        #: Of each key, where it begins and what it is.
        self._kept: dict[bytes, tuple[int, tuple[int, ...], mx.Dtype]] = {}

    def get(self, key: bytes) -> mx.array | None:
        """See `Store`."""
        if (found := self._kept.get(key)) is None:
            return None
        start, shape, dtype = found
        self._file.seek(start)
        words = np.empty(shape, _WORDS[dtype.size])
        view, at = memoryview(words.data).cast("B"), 0
        while at < len(view):
            count = self._file.readinto(view[at:])  # type: ignore[attr-defined]
            if not count:
                # Somebody has cut the file; it can be computed again.
                del self._kept[key]
                return None
            at += count
        return mx.array(words).view(dtype)

    def keep(self, key: bytes, value: mx.array) -> None:
        """See `Store`."""
        if value.nbytes > self._room:
            return
        words = np.ascontiguousarray(value.view(_MX_WORDS[value.dtype.size]))
        content = memoryview(words.data).cast("B")
        try:
            self._file.seek(self._end)
            at = 0
            while at < len(content):
                at += self._file.write(content[at:])
        except OSError:
            self._give_up()
            return
        self._kept[key] = (self._end, tuple(value.shape), value.dtype)
        self._end += value.nbytes
        self._room -= value.nbytes

    def _give_up(self) -> None:
        self._room = 0
        self._kept.clear()
        with suppress(OSError):
            self._file.truncate(0)


#: Integers as wide as a type, since numpy knows no bfloat16.
_WORDS = {2: np.uint16, 4: np.uint32}
_MX_WORDS = {2: mx.uint16, 4: mx.uint32}


class FrozenRows:
    """The trunk's output of each row seen.

    Args:
        trunk: What computes them.
        store: Where they are kept; None keeps none.
    """

    def __init__(self, trunk: Trunk, store: Store | None) -> None:
        self._trunk = trunk
        self._store = store

    def batch(self, batch: Batch, *, keep: bool) -> mx.array:
        """The trunk's output of a padded batch: (B, T, D), zero on padding.

        Args:
            keep: Whether the rows will be seen again.
        """
        width = batch.tokens.shape[1]
        rows = [self._row(batch.tokens[at, :length], keep=keep) for at, length in enumerate(batch.lengths)]
        return mx.stack([mx.pad(row, [(0, width - row.shape[0]), (0, 0)]) for row in rows])

    def _row(self, tokens: NDArray[np.int32], *, keep: bool) -> mx.array:
        key = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
        if self._store is not None and (kept := self._store.get(key)) is not None:
            return kept
        length = len(tokens)
        padded = np.pad(tokens, (0, padded_width(length) - length))
        hidden = mx.contiguous(self._trunk.below(mx.array(padded)[None])[0, :length])
        mx.eval(hidden)
        if self._store is not None and keep:
            self._store.keep(key, hidden)
        return hidden
