"""Where training takes a teacher's distribution from: what `logits` wrote, or the teacher itself, asked on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mlx_distill.batches import Batch, TeacherBuckets
from mlx_distill.config import DEFAULT_TOP_K, TrainConfig
from mlx_distill.dataset import TokenSplit
from mlx_distill.logit_cache import LogitReader
from mlx_distill.logit_source import known_words, local_teacher, open_logits, require_same_tokenizer
from mlx_distill.models.folder import fingerprint
from mlx_distill.models.resolve import resolve
from mlx_distill.progress import Progress
from mlx_distill.records import content_hash

#: Bytes at most of what an online teacher said of the validation rows and is kept: these are asked for again and again.
KEPT_BYTES = 256 << 20

#: The split whose rows are asked for again and again.
_KEPT = "valid"


class Teaching(Protocol):
    """A teacher, as the loop asks it.

    Attributes:
        words: That it tells apart; its ids are below.
        weights_bytes: Of its weights; 0 where it is not in memory.
        position_bytes: Of what it says of a position; 0 where nothing of that is kept.
    """

    words: int
    weights_bytes: int
    position_bytes: int

    def with_teacher(self, split: str, batch: Batch) -> Batch:
        """A batch of a split with what the teacher says at its positions."""
        ...

    def measure(self, width: int) -> int:
        """Bytes that reading takes at its peak, beyond what is held before, where the longest row has this width."""
        ...

    def keep(self, size: int) -> None:
        """Keep this many bytes at most of what is asked for again."""
        ...


class Taught(NamedTuple):
    """A teacher, and what is recorded of it.

    Attributes:
        name: As it was named.
        sha256: Hash of all that decides what it says.
        licence: As its files state it.
    """

    teaching: Teaching
    name: str
    sha256: str
    licence: str | None


class CachedTeacher:
    """Implements `Teaching` over files.

    Args:
        words: That the teacher tells apart.
        readers: Of each split.
    """

    weights_bytes = 0
    position_bytes = 0

    def __init__(self, words: int, readers: Mapping[str, LogitReader]) -> None:
        self.words = words
        self._readers = readers

    def with_teacher(self, split: str, batch: Batch) -> Batch:
        """See `Teaching`."""
        return self._readers[split].with_teacher(batch)

    def measure(self, width: int) -> int:
        """See `Teaching`. No more than the batch itself."""
        return 0

    def keep(self, size: int) -> None:
        """See `Teaching`. All of it is on disk."""


class OnlineTeacher:
    """Implements `Teaching` over a model that is in memory beside the student.

    It reads a batch row by row: what it says of a row is then the same to the bit, however many rows the student
    computes at once, and can be kept.

    Args:
        folder: In Hugging Face layout.
        dtype: Of its weights, as in training.
        known: Words that student and teacher both know; see `LogitTeacher`.
    """

    def __init__(self, folder: Path, dtype: str, known: int) -> None:
        from mlx_distill.backends.mlx.teaching import LogitTeacher

        self._teacher = LogitTeacher(folder, dtype=dtype, known=known)
        self.words = self._teacher.words
        self._top_k = min(DEFAULT_TOP_K, self.words)
        self.weights_bytes = self._teacher.weights_bytes
        # Ids and logarithms, with that of the rest.
        self.position_bytes = 4 * self._top_k + 4 * (self._top_k + (self._top_k < self.words))
        self._kept: dict[int, TeacherBuckets] = {}
        self._room = 0

    def with_teacher(self, split: str, batch: Batch) -> Batch:
        """See `Teaching`."""
        again = split == _KEPT and not batch.own
        rows = [int(row) for row in batch.rows]
        found = {at: self._kept[row] for at, row in enumerate(rows) if again and row in self._kept}
        missing = [at for at in range(len(rows)) if at not in found]
        for at, said in zip(missing, self._teacher.row_by_row(batch, missing, self._top_k), strict=True):
            found[at] = said
            if again:
                self._keep(rows[at], said)
        said_of = [found[at] for at in range(len(rows))]
        ids, logs = np.concatenate([s.ids for s in said_of]), np.concatenate([s.log_probs for s in said_of])
        return replace(batch, teacher=TeacherBuckets(ids, logs))

    def measure(self, width: int) -> int:
        """See `Teaching`."""
        return self._teacher.measure(width, self._top_k)

    def keep(self, size: int) -> None:
        """See `Teaching`. Each row that fits is kept when it is first asked for."""
        self._room = size

    def _keep(self, row: int, said: TeacherBuckets) -> None:
        size = said.ids.nbytes + said.log_probs.nbytes
        if size <= self._room:
            self._kept[row] = said
            self._room -= size


def open_teaching(
    config: TrainConfig, splits: dict[str, TokenSplit], tokenizer: Any, model: Path, progress: Progress
) -> Taught | None:
    """The teacher of a training; None where its distribution is not learned.

    Args:
        tokenizer: The student's.
        model: The student's folder.

    Raises:
        ConfigError: It gives text alone.
        InputError: Its logits are not whole, or of other data or another tokenizer.
        ModelError: It cannot be found or loaded, or has another tokenizer.
    """
    if config.teacher_logits is not None:
        record, readers = open_logits(config.teacher_logits, splits, tokenizer, known_words(tokenizer, model))
        sha256 = content_hash(record.model_dump(mode="json"))
        return Taught(CachedTeacher(record.words, readers), record.teacher, sha256, record.licence)
    if config.teacher_online is None:
        return None
    spec = local_teacher(config.teacher_online)
    found = resolve(spec, progress=progress)
    folder = Path(found.path)
    require_same_tokenizer(spec, folder, tokenizer, splits, max_length=config.max_length)
    with progress.task(f"Loading {found.name}, the teacher"):
        teacher = OnlineTeacher(folder, config.dtype, known_words(tokenizer, model))
    weights = fingerprint(folder) if found.source == "folder" else None
    return Taught(teacher, spec, content_hash([found.revision, weights, teacher.words]), found.licence)
