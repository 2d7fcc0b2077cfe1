"""The step `logits`.

Reads: data/NAME/{train,valid,test}.jsonl, a local teacher.
Writes: data/NAME/logits/TEACHER-K/{logits.json,SPLIT.logits,SPLIT.done}.

A student that learns a teacher's distribution needs it at every position that carries loss. It is computed once, by
the teacher alone, so that teacher and student are never in memory together. Rows are kept as they are computed: the
same command goes on where it was stopped, and makes again what is damaged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_distill import layout
from mlx_distill.batches import TeacherBuckets, make_batch
from mlx_distill.config import LogitsConfig
from mlx_distill.dataset import TokenSplit, load_splits
from mlx_distill.errors import ConfigError, OccupiedError
from mlx_distill.logit_cache import (
    MOST_NAMED,
    MOST_WORDS,
    LogitsRecord,
    LogitWriter,
    SplitLogits,
    entry_type,
    forget,
    packed,
)
from mlx_distill.logit_source import known_words, local_teacher, read_positions
from mlx_distill.models.folder import fingerprint
from mlx_distill.models.resolve import resolve
from mlx_distill.models.tokenizer import load_tokenizer, require_chat_template
from mlx_distill.progress import SILENT, Progress
from mlx_distill.records import content_hash
from mlx_distill.vocabulary import vocabulary_sha256


def logits_folder(config: LogitsConfig) -> Path:
    """Where the logits go: beside the data set."""
    if config.out is not None:
        return config.out
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", config.teacher.removeprefix("mlx:").rstrip("/").rpartition("/")[2])
    return config.data / "logits" / f"{name}-{config.top_k}"


def write_logits(config: LogitsConfig, progress: Progress = SILENT) -> LogitsRecord:
    """Write what a teacher says at every position of a data set that carries loss.

    Raises:
        ConfigError: The teacher is not a local model, or has fewer words than K.
        InputError: The data set is missing or malformed.
        ModelError: The teacher cannot be found or loaded, or computes what is no number.
        OccupiedError: The folder holds the logits of something else.
        FolderError: Another process writes there.
        ResourceError: Not enough disk or memory.
    """
    from mlx_distill.backends.mlx.teaching import LogitTeacher

    spec = local_teacher(config.teacher)
    model = resolve(spec, progress=progress)
    tokenizer: Any = load_tokenizer(Path(model.path))
    require_chat_template(tokenizer, config.teacher)
    splits = load_splits(config.data, tokenizer, max_length=config.max_length, progress=progress)
    folder = logits_folder(config)
    with layout.lock(folder):
        with progress.task(f"Loading {model.name}"):
            known = known_words(tokenizer, Path(model.path))
            teacher = LogitTeacher(Path(model.path), dtype=config.dtype, known=known)
        _require_words(config, teacher.words)
        read = {name: read_positions(split) for name, split in splits.items()}
        record = LogitsRecord(
            teacher=spec,
            revision=model.revision,
            fingerprint=fingerprint(Path(model.path)) if model.source == "folder" else None,
            licence=model.licence,
            top_k=config.top_k,
            words=teacher.words,
            vocabulary_sha256=vocabulary_sha256(tokenizer),
            template_sha256=content_hash(tokenizer.chat_template),
            max_length=config.max_length,
            dtype=teacher.dtype,
            splits={
                name: SplitLogits(
                    sha256=split.sha256,
                    tokens_sha256=read[name][1],
                    rows=len(split.rows),
                    positions=split.target_tokens,
                )
                for name, split in splits.items()
            },
        )
        _claim(folder, record)
        size = sum(split.target_tokens for split in splits.values()) * entry_type(config.top_k).itemsize
        layout.require_disk(folder, size, what="The teacher's logits")
        for name, split in splits.items():
            writer = LogitWriter(folder, name, config.top_k, read[name][0])
            with progress.task(f"{name}: the teacher reads", total=len(split.rows), unit="rows") as bar:
                bar.advance(len(split.rows) - len(writer.missing))
                for rows in _by_length(writer.missing, split, config.batch_size):
                    batch = make_batch(split.rows, rows)
                    found = teacher.likeliest(batch, config.top_k)
                    with layout.explained_disk(folder):
                        writer.write(rows, _of_rows(found, batch.loss_mask))
                    bar.advance(len(rows))
    return record


def _require_words(config: LogitsConfig, words: int) -> None:
    if config.top_k > MOST_NAMED:
        raise ConfigError(
            f"--top-k {config.top_k}: at most {MOST_NAMED:,}.", hint="64 hold nearly all of a distribution."
        )
    if words > MOST_WORDS:
        raise ConfigError(f"{config.teacher} knows {words:,} words, more than {MOST_WORDS:,}: its ids do not fit.")
    if config.top_k > words:
        raise ConfigError(
            f"--top-k {config.top_k} is more than the {words:,} words of {config.teacher}.",
            hint="64 hold nearly all of a distribution.",
        )


def _claim(folder: Path, record: LogitsRecord) -> None:
    """Write the record, or see that the one that is there is the same."""
    path = layout.logits_record(folder)
    if path.exists():
        earlier = layout.read_record(path, LogitsRecord)
        if earlier == record:
            return
        changed = [
            key
            for key in LogitsRecord.model_fields
            if getattr(earlier, key) != getattr(record, key) and key != "splits"
        ]
        changed += [f"{name}.jsonl" for name in record.splits if earlier.splits.get(name) != record.splits[name]]
        raise OccupiedError(
            f"{folder} holds other logits. Different: {', '.join(changed)}.",
            hint="Choose another --out, or remove these if you no longer need them.",
        )
    # Entries that no record describes may be of another teacher.
    for name in record.splits:
        forget(folder, name)
    layout.write_text(path, record.model_dump_json(indent=2, exclude_none=True) + "\n")


def _by_length(rows: Sequence[int], split: TokenSplit, size: int) -> Iterator[list[int]]:
    """Rows in batches of like length, the longest first: the peak of memory comes first."""
    order = sorted(rows, key=lambda row: (-int(split.lengths[row]), row))
    for at in range(0, len(order), size):
        yield order[at : at + size]


def _of_rows(found: TeacherBuckets, mask: NDArray[np.bool_]) -> list[NDArray[np.void]]:
    """The entries of each row of a batch."""
    ends = np.cumsum(mask.sum(axis=1))
    return np.split(packed(found), ends[:-1])
