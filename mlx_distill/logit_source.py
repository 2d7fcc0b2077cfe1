"""Does a teacher's distribution fit a student's rows: are they of the same data, cut by the same tokenizer?

That is told by the vocabulary and by the tokens of the rows, of logits on disk as of a teacher that is asked.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_distill import layout
from mlx_distill.dataset import TokenSplit, tokenise_split
from mlx_distill.errors import ConfigError, InputError, MlxDistillError, ModelError
from mlx_distill.logit_cache import LogitReader, LogitsRecord, SplitLogits, read_logits_record
from mlx_distill.models.folder import read_config
from mlx_distill.models.resolve import resolve_here
from mlx_distill.models.tokenizer import load_tokenizer, require_chat_template
from mlx_distill.records import content_hash
from mlx_distill.tokenising import token_count, tokenizer_identity
from mlx_distill.vocabulary import differing_words, vocabulary_sha256

_TEXT_INSTEAD = "Learn from the teacher's text instead:  mlx-distill collect --teacher mlx:MODEL"


def open_logits(
    folder: Path, splits: dict[str, TokenSplit], tokenizer: Any, words: int
) -> tuple[LogitsRecord, dict[str, LogitReader]]:
    """A teacher's logits, for a student that is to learn them.

    Args:
        splits: Of the student, tokenised by its own tokenizer.
        tokenizer: The student's.
        words: That the student knows.

    Raises:
        InputError: There are none, they are not whole, or they are of other data or of another tokenizer; says what
            differs.
    """
    record = read_logits_record(folder)
    _require_same_words(folder, record, tokenizer, words)
    readers: dict[str, LogitReader] = {}
    for name, split in splits.items():
        written = record.splits.get(name)
        if written is None:
            raise InputError(
                f"the teacher's logits hold no {split.path.name}: it was not there, or none of its rows has at most "
                f"{record.max_length} tokens.",
                path=layout.logits_record(folder),
                hint="Make them again, into another --out:  mlx-distill logits --help",
            )
        if written.sha256 != split.sha256:
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


def known_words(tokenizer: Any, model: Path) -> int:
    """How many words a model knows: those of its tokenizer, as far as it has a logit for them.

    Args:
        model: Its folder.

    Raises:
        ModelError: There is no readable `config.json`.
    """
    columns = read_config(model).get("vocab_size")
    count = token_count(tokenizer)
    return min(count, columns) if isinstance(columns, int) else count


def require_same_tokenizer(
    spec: str, folder: Path, tokenizer: Any, splits: dict[str, TokenSplit], *, max_length: int
) -> None:
    """Refuse a teacher that has other words than the student, or would cut or write the student's rows otherwise.

    Args:
        spec: The teacher, as the user named it.
        folder: The teacher's.
        tokenizer: The student's.
        splits: Tokenised by it.
        max_length: That they were tokenised with.

    Raises:
        ModelError: Says what differs.
    """
    theirs: Any = load_tokenizer(folder)
    if (how := differing_words(theirs, tokenizer)) is not None:
        raise ModelError(_not_the_same(spec, how), hint=_TEXT_INSTEAD)
    require_chat_template(theirs, spec)
    if tokenizer_identity(theirs) == tokenizer_identity(tokenizer):
        return
    for split in splits.values():
        there = tokenise_split(split.path, theirs, max_length=max_length)
        if read_positions(there)[1] != read_positions(split)[1]:
            how = _rows_differ(theirs.chat_template == tokenizer.chat_template)
            raise ModelError(_not_the_same(spec, how), hint=_TEXT_INSTEAD)


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
        raise _other_tokenizer(folder, record, _rows_differ(same))
    number = {int(line): at for at, line in enumerate(whole.lines)}
    if lacking := [int(line) for line in split.lines if int(line) not in number]:
        raise InputError(
            f"the teacher's logits lack {len(lacking)} rows, the first on line {lacking[0]}: they were made with "
            f"--max-length {record.max_length}.",
            path=layout.logits_record(folder),
            hint="Train with that, or make them again with a greater one, into another --out.",
        )
    return positions, np.array([number[int(line)] for line in split.lines], np.int64)


def _require_same_words(folder: Path, record: LogitsRecord, tokenizer: Any, words: int) -> None:
    if vocabulary_sha256(tokenizer) != record.vocabulary_sha256:
        raise _other_tokenizer(folder, record, _words_apart(record, tokenizer))
    if words < record.words:
        raise InputError(
            f"{record.teacher} tells {record.words:,} words apart and the student {words:,}.",
            path=layout.logits_record(folder),
            hint="Make the logits again, into another --out: a vocabulary's padding is left out now.",
        )


def _words_apart(record: LogitsRecord, tokenizer: Any) -> str:
    """In what the vocabularies differ, where the teacher is still on this machine."""
    plain = "their vocabularies differ"
    try:
        there = resolve_here(record.teacher)
        return plain if there is None else differing_words(load_tokenizer(Path(there.path)), tokenizer) or plain
    except (MlxDistillError, OSError):
        return plain


def _rows_differ(same_template: bool) -> str:
    return f"their {'tokenizers cut' if same_template else 'chat templates write'} the rows of this data set otherwise"


def _not_the_same(teacher: str, how: str) -> str:
    return f"{teacher} and the student do not have the same tokenizer: {how}."


def _other_tokenizer(folder: Path, record: LogitsRecord, how: str) -> InputError:
    return InputError(_not_the_same(record.teacher, how), path=layout.logits_record(folder), hint=_TEXT_INSTEAD)
