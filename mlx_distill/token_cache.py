"""Tokens of data files, made once and kept in the user's cache.

Reads: a data file.
Writes: `CACHE/tokens/KE/KEY/`, a store (see `token_store`), where the key is a hash of the file's content, of all that
decides how the tokenizer cuts it, and of our own format. KE are the first two digits of the key; the folder with that
name holds the lock for all stores in it.

A store is written under a temporary name and renamed when it is whole. Of two processes that want the same one, one
makes it and the other waits. A damaged store is made again. Where the cache cannot be written, the tokens go into a
temporary file or, at last, into memory: training goes on. The stores used longest ago are removed when all together
are larger than `LIMIT_BYTES`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from mlx_distill import layout
from mlx_distill.errors import FolderError, InputError, InUseError, MlxDistillError, ResourceError
from mlx_distill.progress import SILENT, Progress
from mlx_distill.records import content_hash
from mlx_distill.rows import read_rows, unreadable
from mlx_distill.token_store import (
    FILES,
    HEADER,
    STORE_FORMAT,
    StoreError,
    StoreHeader,
    StoreWriter,
    TokenStore,
    TokenType,
    map_store,
    memory_files,
    open_store,
    store_files,
)
from mlx_distill.tokenising import token_count, tokenise_rows, tokenizer_identity

#: Of all stores together.
LIMIT_BYTES = 20 * 10**9

#: A data file up to this size is tokenised in the time that it takes to write a store and check it: it has none.
SMALL_BYTES = 1 << 18

_WAIT_SECONDS = 0.5
_BLOCK_BYTES = 1 << 20


def token_folder() -> Path:
    """Where stores are kept."""
    return layout.models_cache() / "tokens"


@dataclass(frozen=True)
class TokenisedFile:
    """A data file's rows as tokens.

    Attributes:
        sha256: Of the file.
    """

    sha256: str
    store: TokenStore


@dataclass(frozen=True)
class _Source:
    """A data file, as it was when it was first read.

    Attributes:
        lines: How many it has.
        key: Hash of it, the tokenizer and the format.
    """

    path: Path
    sha256: str
    lines: int
    key: str


class TokenCache:
    """Tokenised files of one tokenizer.

    Args:
        tokenizer: A fast transformers tokenizer with a chat template.
        progress: Who watches.
        small: Files of up to this many bytes are tokenised into memory, and not kept.
        limit: Of all stores together, in bytes.

    Raises:
        ModelError: The tokenizer is none of the fast ones.
    """

    def __init__(
        self, tokenizer: Any, *, progress: Progress = SILENT, small: int = SMALL_BYTES, limit: int = LIMIT_BYTES
    ) -> None:
        self._tokenizer = tokenizer
        self._identity = tokenizer_identity(tokenizer)
        self._progress = progress
        self._small = small
        self._limit = limit
        self._root = token_folder()
        self._used: set[Path] = set()
        self._made_any = False

    def load(self, path: Path) -> TokenisedFile:
        """The tokens of a data file; made if the cache lacks them.

        Raises:
            InputError: The file is missing or malformed, or changes while it is read.
        """
        source, size = self._look_at(path)
        if size <= self._small:
            return TokenisedFile(source.sha256, self._make_in(memory_files(), source))
        if (store := self._kept(source)) is None:
            store = self._make_in_turn(source)
        return TokenisedFile(source.sha256, store)

    @cached_property
    def _token_type(self) -> TokenType:
        return "<u2" if token_count(self._tokenizer) <= 1 << 16 else "<i4"

    def folder(self, key: str) -> Path:
        """Where the store with this key lies, or would lie."""
        return self._root / key[:2] / key

    def trim(self) -> None:
        """Remove the stores used longest ago while all together are larger than the limit.

        Those that this cache was asked for stay. What another process has mapped stays readable to it.
        """
        if not self._made_any:
            return
        stores = []
        for shelf in self._root.glob("??"):
            with contextlib.suppress(OSError, FolderError), layout.lock(shelf):
                layout.sweep(shelf)
            with contextlib.suppress(OSError):
                stores += [found for folder in shelf.iterdir() if (found := _measure(folder)) is not None]
        total = sum(size for _, size, _ in stores)
        for _, size, folder in sorted(stores):
            if total <= self._limit:
                break
            if folder in self._used:
                continue
            with contextlib.suppress(OSError, FolderError), layout.lock(folder.parent):
                # Without its header it is no store, should this be cut off.
                (folder / HEADER).unlink(missing_ok=True)
                shutil.rmtree(folder)
                total -= size

    def _look_at(self, path: Path) -> tuple[_Source, int]:
        digest, lines, size, last = hashlib.sha256(), 0, 0, b"\n"
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    digest.update(block)
                    lines += block.count(b"\n")
                    size += len(block)
                    last = block[-1:]
        except OSError as error:
            raise unreadable(error, path) from None
        key = content_hash({"format": STORE_FORMAT, "data": digest.hexdigest(), "tokenizer": self._identity})[:32]
        return _Source(path, digest.hexdigest(), lines + (last != b"\n"), key), size

    def _kept(self, source: _Source, *, tell: bool = True) -> TokenStore | None:
        """The store that the cache has, if it is whole."""
        folder = self.folder(source.key)
        try:
            store = open_store(folder, key=source.key)
        except FileNotFoundError:
            return None
        except StoreError as error:
            if tell:
                self._progress.say(
                    f"The tokens of {source.path} in {folder} are not whole ({error}); making them anew."
                )
            return None
        with contextlib.suppress(OSError):
            os.utime(folder / HEADER)
        self._used.add(folder)
        return store

    def _make_in_turn(self, source: _Source) -> TokenStore:
        folder = self.folder(source.key)
        told = False
        while True:
            try:
                with layout.lock(folder.parent):
                    layout.sweep(folder.parent)
                    # Another process may have made it while this one waited.
                    if (store := self._kept(source, tell=False)) is None:
                        self._make_kept(source, folder)
                        store = open_store(folder, key=source.key)
                        self._used.add(folder)
                return store
            except InUseError:
                if not told:
                    self._progress.say(f"Another process is writing tokens into {folder.parent}; waiting for it.")
                    told = True
                time.sleep(_WAIT_SECONDS)
            except (FolderError, ResourceError, StoreError, OSError) as error:
                return self._make_elsewhere(source, error.message if isinstance(error, MlxDistillError) else str(error))

    def _make_kept(self, source: _Source, folder: Path) -> None:
        # Tokens take about as much room as their text.
        layout.require_disk(folder.parent, source.path.stat().st_size, what=f"Tokenising {source.path.name}")
        with layout.atomic_folder(folder) as temporary:
            with store_files(temporary) as files:
                header = self._write(files, source)
            (temporary / HEADER).write_text(header.to_json() + "\n", encoding="utf-8")
        self._made_any = True

    def _make_elsewhere(self, source: _Source, reason: str) -> TokenStore:
        self._progress.say(f"The tokens of {source.path.name} cannot be kept for the next run: {reason}")
        try:
            with ExitStack() as stack:
                # They have no name any more: when they are not mapped any longer, they are gone.
                files = {name: stack.enter_context(tempfile.TemporaryFile()) for name in FILES}
                return self._make_in(files, source)
        except OSError as error:
            self._progress.say(f"Nor can they be put into a temporary file ({error.strerror}): into memory, then.")
        return self._make_in(memory_files(), source)

    def _make_in(self, files: Mapping[str, BinaryIO], source: _Source) -> TokenStore:
        return map_store(files, self._write(files, source))

    def _write(self, files: Mapping[str, BinaryIO], source: _Source) -> StoreHeader:
        writer = StoreWriter(files, self._token_type)
        digest = hashlib.sha256()
        rows = read_rows(source.path, digest=digest)
        done = 0
        with (
            self._progress.task(f"Tokenising {source.path.name}", total=source.lines, unit="lines") as bar,
            closing(tokenise_rows(rows, self._tokenizer, source.path)) as tokenised,
        ):
            for line, row in tokenised:
                writer.add(line, row)
                bar.advance(line - done)
                done = line
            bar.advance(source.lines - done)
        if digest.hexdigest() != source.sha256:
            raise InputError(
                "the file was changed while it was read.",
                path=source.path,
                hint="Run the same command again when nothing writes it any more.",
            )
        return writer.finish(key=source.key)


def _measure(folder: Path) -> tuple[int, int, Path] | None:
    """When a store was last used, its bytes, and where it is; None for what is no store's folder."""
    if folder.name.startswith("."):
        return None
    size = used = 0
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            stat = file.stat()
            size += stat.st_size
            if file.name == HEADER:
                used = stat.st_mtime_ns
        return used, size, folder
    return None
