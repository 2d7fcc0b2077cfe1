"""A teacher's logits, found again for the rows of a student: of the same data, cut by the same tokenizer."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_distill import layout
from mlx_distill.dataset import TokenSplit, tokenise_split
from mlx_distill.errors import ConfigError, InputError
from mlx_distill.logit_cache import LogitReader, LogitsRecord, SplitLogits, read_logits_record
from mlx_distill.records import content_hash


def vocabulary_sha256(tokenizer: Any) -> str:
    """Hash of a tokenizer's words and their ids; the rows that a model adds to its embedding are none of them."""
    return content_hash(sorted(tokenizer.get_vocab().items()))


def open_logits(
    folder: Path, splits: dict[str, TokenSplit], tokenizer: Any, words: int
) -> tuple[LogitsRecord, dict[str, LogitReader]]:
    """A teacher's logits, for a student that is to learn them.

    Args:
        splits: Of the student, tokenised by its own tokenizer.
        tokenizer: The student's.
        words: Of the student's vocabulary.

    Raises:
        InputError: There are none, they are not whole, or they are of other data or of another tokenizer; says what
            differs.
    """
    record = read_logits_record(folder)
    _require_same_tokenizer(folder, record, tokenizer, words)
    readers: dict[str, LogitReader] = {}
    for name, split in splits.items():
        written = record.splits.get(name)
        if written is None or written.sha256 != split.sha256:
            raise InputError(
                f"the teacher's logits are of another {split.path.name}.",
                path=layout.logits_record(folder),
                hint="Make those of this data set:  mlx-distill logits --help",
            )
        positions, places = _places(split, record, written, tokenizer, folder)
        readers[name] = LogitReader(folder, name, record, positions, places)
    return record, readers


def local_teacher(spec: str) -> str:
    """The model that a teacher's spec names, `mlx:MODEL` or MODEL.

    Raises:
        ConfigError: It is no local model: its distribution is not known.
    """
    if spec.partition(":")[0] in ("anthropic", "openai", "recorded"):
        raise ConfigError(
            f"{spec} gives text alone; its distribution is not known.",
            hint="Take an open-weight teacher, mlx:MODEL, or learn from the text:  mlx-distill collect --help",
        )
    return spec.removeprefix("mlx:")


def read_positions(split: TokenSplit) -> tuple[NDArray[np.int64], str]:
    """Which positions of a split carry loss, in one reading of its rows.

    Returns:
        How many of each row, (rows,), and a hash of what a tokenizer and its chat template made of the split: equal
        where the positions are the same ones.
    """
    digest = hashlib.sha256()
    positions = np.empty(len(split.rows), np.int64)
    for at, row in enumerate(split.rows):
        digest.update(len(row.tokens).to_bytes(4, "little"))
        digest.update(np.ascontiguousarray(row.tokens).tobytes())
        digest.update(np.packbits(row.loss_mask).tobytes())
        positions[at] = row.target_tokens
    return positions, digest.hexdigest()


def _places(
    split: TokenSplit, record: LogitsRecord, written: SplitLogits, tokenizer: Any, folder: Path
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of each row that was written, and which of these each row of the split is."""
    whole = tokenise_split(split.path, tokenizer, max_length=record.max_length)
    positions, found = read_positions(whole)
    if found != written.tokens_sha256:
        same = content_hash(tokenizer.chat_template) == record.template_sha256
        raise _other_tokenizer(folder, record, "tokenizers cut" if same else "chat templates write")
    number = {int(line): at for at, line in enumerate(whole.lines)}
    if lacking := [int(line) for line in split.lines if int(line) not in number]:
        raise InputError(
            f"the teacher's logits lack {len(lacking)} rows, the first on line {lacking[0]}: they were made with "
            f"--max-length {record.max_length}.",
            path=layout.logits_record(folder),
            hint="Train with that, or make them again with a greater one, into another --out.",
        )
    return positions, np.array([number[int(line)] for line in split.lines], np.int64)


def _require_same_tokenizer(folder: Path, record: LogitsRecord, tokenizer: Any, words: int) -> None:
    if vocabulary_sha256(tokenizer) != record.vocabulary_sha256:
        raise _other_tokenizer(folder, record, None)
    if words < record.words and record.top_k == record.words:
        raise InputError(
            f"{record.teacher} has {record.words:,} columns of logits and the student {words:,}.",
            path=layout.logits_record(folder),
            hint="Make the logits again with a --top-k below both.",
        )


def _other_tokenizer(folder: Path, record: LogitsRecord, what: str | None) -> InputError:
    how = "their vocabularies differ" if what is None else f"their {what} the rows of this data set otherwise"
    return InputError(
        f"{record.teacher} and the student do not have the same tokenizer: {how}.",
        path=layout.logits_record(folder),
        hint="Learn from the teacher's text instead:  mlx-distill collect --teacher mlx:MODEL",
    )
