"""Where training takes a teacher's distribution from: what `logits` wrote, or the teacher itself, asked on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from mlx_distill.batches import Batch
from mlx_distill.config import DEFAULT_TOP_K, TrainConfig
from mlx_distill.dataset import TokenSplit
from mlx_distill.errors import ModelError
from mlx_distill.logit_cache import LogitReader
from mlx_distill.logit_source import local_teacher, open_logits, vocabulary_sha256
from mlx_distill.models.folder import fingerprint, read_config
from mlx_distill.models.resolve import resolve
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.progress import Progress
from mlx_distill.records import content_hash


class Teaching(Protocol):
    """A teacher, as the loop asks it."""

    def with_teacher(self, split: str, batch: Batch) -> Batch:
        """A batch of a split with what the teacher says at its positions."""
        ...


class CachedTeacher:
    """Implements `Teaching` over files.

    Args:
        readers: Of each split.
    """

    def __init__(self, readers: Mapping[str, LogitReader]) -> None:
        self._readers = readers

    def with_teacher(self, split: str, batch: Batch) -> Batch:
        """See `Teaching`."""
        return self._readers[split].with_teacher(batch)


class OnlineTeacher:
    """Implements `Teaching` over a model that is in memory beside the student."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from mlx_distill.backends.mlx.teaching import LogitTeacher

        self._teacher = LogitTeacher(folder, dtype=dtype)
        self._top_k = min(DEFAULT_TOP_K, self._teacher.words)

    def with_teacher(self, split: str, batch: Batch) -> Batch:
        """See `Teaching`. The split makes no difference here."""
        return replace(batch, teacher=self._teacher.likeliest(batch, self._top_k))


def open_teaching(
    config: TrainConfig, splits: dict[str, TokenSplit], tokenizer: Any, model: Path, progress: Progress
) -> tuple[Teaching, str, str] | None:
    """The teacher of a training: itself, its name, and the hash of all that decides what it says. None without one.

    Args:
        tokenizer: The student's.
        model: The student's folder.

    Raises:
        ConfigError: It gives text alone.
        InputError: Its logits are not whole, or of other data or another tokenizer.
        ModelError: It cannot be found or loaded, or has another tokenizer.
    """
    if config.teacher_logits is not None:
        words = read_config(model).get("vocab_size")
        record, readers = open_logits(config.teacher_logits, splits, tokenizer, words if isinstance(words, int) else 0)
        return CachedTeacher(readers), record.teacher, content_hash(record.model_dump(mode="json"))
    if config.teacher_online is None:
        return None
    spec = local_teacher(config.teacher_online)
    found = resolve(spec, progress=progress)
    folder = Path(found.path)
    if vocabulary_sha256(load_tokenizer(folder)) != vocabulary_sha256(tokenizer):
        raise ModelError(
            f"{spec} and the student do not have the same tokenizer: their vocabularies differ.",
            hint="Learn from the teacher's text instead:  mlx-distill collect --teacher mlx:MODEL",
        )
    with progress.task(f"Loading {found.name}, the teacher"):
        teacher = OnlineTeacher(folder, config.dtype)
    return teacher, spec, content_hash([found.revision, fingerprint(folder) if found.source == "folder" else None])
