"""Do two tokenizers have the same words? Told by content, and where they differ, in what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_distill.records import content_hash

#: Words named of each kind of difference.
_EXAMPLES = 3


def vocabulary_sha256(tokenizer: Any) -> str:
    """Hash of a tokenizer's words and their ids; the rows that a model adds to its embedding are none of them."""
    return content_hash(sorted(tokenizer.get_vocab().items()))


def differing_words(teacher: Any, student: Any) -> str | None:
    """In which words two tokenizers differ, as a clause; None where they have the same, each with the same id."""
    theirs, own = teacher.get_vocab(), student.get_vocab()
    if theirs == own:
        return None
    # By id, so that what was added to a vocabulary comes last, and together.
    alone = sorted(theirs.keys() - own.keys(), key=theirs.__getitem__)
    owned = sorted(own.keys() - theirs.keys(), key=own.__getitem__)
    moved = sorted((word for word in theirs.keys() & own.keys() if theirs[word] != own[word]), key=own.__getitem__)
    kinds = [
        (alone, "only the teacher's", [repr(word) for word in alone[:_EXAMPLES]]),
        (owned, "only the student's", [repr(word) for word in owned[:_EXAMPLES]]),
        (moved, "under another id", [f"{word!r}: {theirs[word]} and {own[word]}" for word in moved[:_EXAMPLES]]),
    ]
    told = ", ".join(f"{len(words):,} {how} ({_listed(words, named)})" for words, how, named in kinds if words)
    return f"their vocabularies differ: {told}"


def _listed(words: Sequence[str], named: Sequence[str]) -> str:
    return ", ".join(named) + ", …" * (len(words) > len(named))
