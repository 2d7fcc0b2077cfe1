"""Keeps a judge from knowing whom it judges: takes names and self-mentions out of an answer.

A name is replaced wherever it stands, in code too; a sentence in which a model speaks of itself is cut out of the
prose. A name that is a plain word, such as "base", goes only where somebody is introduced by it: elsewhere it says
nothing. What a style of writing gives away stays: no text can be blind to that.
"""

from __future__ import annotations

import re
from functools import cache

from mlx_distill.code_blocks import code_blocks, lines_of
from mlx_distill.families import FAMILIES, family, same_family

__all__ = ["FAMILIES", "REMOVED", "REMOVED_IN_CODE", "blinded", "family", "same_family"]

#: What stands for a name: the second where it may have to be an identifier.
REMOVED, REMOVED_IN_CODE = "[name removed]", "name_removed"

#: A name of this length goes also where it is glued to other letters.
_LONG = 8

_KNOWN = re.compile(rf"(?<![^\W_])(?:{'|'.join(FAMILIES.values())})(?![^\W\d_])", re.IGNORECASE)

_A_MODEL = (
    r"(?:AI|A\.I\.|artificial intelligence|(?:large )?language model|LLM|chatbot|assistant"
    r"|(?:teacher|student|base|distilled|fused|fine-?tuned) model)"
)
#: A clause or sentence in which a model speaks of itself. It ends with the sentence, or at the comma of "As an AI, ".
_SELF = re.compile(
    rf"\b(?:I am|I'm|I’m|my name is)\b[^.!?\n]{{0,40}}?\b{_A_MODEL}\b[^.!?\n]*[.!?]?"
    rf"|\bas an? (?:[\w-]+ ){{0,3}}?{_A_MODEL}\b[^.,!?\n]*[.,!?]?"
    r"|\b(?:I was|I've been|I have been|I am|I'm|I’m) (?:made|created|trained|developed|built|fine-?tuned|distilled)\b"
    r"[^.!?\n]*[.!?]?",
    re.IGNORECASE,
)
_INTRODUCES = (
    r"(?:\b(?:I am|I'm|I’m|my name is|call me|(?:written|made|answered|generated|signed) by)|\bauthor:|\bsigned:)"
    r"\s{1,3}(?:the\s{1,3})?"
)


def blinded(answer: str, *names: str) -> str:
    """An answer without what names its author.

    Args:
        names: Of all who answered, their models and what they are called, removed in each form: whole, without its
            revision, without its owner, and with other signs between its parts.
    """
    lines = lines_of(answer)
    hidden: list[str] = []
    at = 0
    for block in code_blocks(answer):
        hidden += _hidden_prose(lines[at : block.start], names)
        # In code, a sentence about oneself may be a string that has to stay for it to run.
        hidden.append(_without_names("\n".join(lines[block.start : block.end]), names, REMOVED_IN_CODE))
        at = block.end
    return "\n".join(hidden + _hidden_prose(lines[at:], names))


def _hidden_prose(lines: list[str], names: tuple[str, ...]) -> list[str]:
    """The lines as one text, or none."""
    return [_without_names(_SELF.sub(REMOVED, "\n".join(lines)), names, REMOVED)] if lines else []


def _without_names(text: str, names: tuple[str, ...], instead: str) -> str:
    telling, plain = _patterns(names)
    if telling is not None:
        text = telling.sub(instead, text)
    if plain is not None:
        text = plain.sub(rf"\g<lead>{instead}", text)
    return _KNOWN.sub(instead, text)


@cache
def _patterns(names: tuple[str, ...]) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
    """What finds names that tell something, and plain words where they introduce somebody."""
    forms = {form for name in names for form in _forms(name)}
    telling = sorted((form for form in forms if _tells(form)), key=lambda form: (-len(form), form))
    plain = sorted((form for form in forms if not _tells(form)), key=lambda form: (-len(form), form))
    return (
        re.compile("|".join(map(_anywhere, telling)), re.IGNORECASE) if telling else None,
        re.compile(rf"(?P<lead>{_INTRODUCES})(?:{'|'.join(map(re.escape, plain))})(?!\w)", re.IGNORECASE)
        if plain
        else None,
    )


def _forms(name: str) -> set[str]:
    """A name as it may be written."""
    bare = re.sub(r"^[a-z]+:", "", name)
    without_revision = bare.partition("@")[0]
    return {form for form in (name, bare, without_revision, without_revision.rpartition("/")[2]) if form.strip()}


def _tells(form: str) -> bool:
    """Whether a name is more than a plain word, which stands in many an answer and says nothing."""
    return len(form) > 3 and not form.isalpha()


def _anywhere(form: str) -> str:
    between = r"[-_./@:\s]{1,3}" if re.search(r"\s", form) else r"[-_./@:]{1,3}"
    parts = [part for part in re.split(r"[-_./@:\s]+", form) if part]
    pattern = between.join(map(re.escape, parts)) if parts else re.escape(form)
    return pattern if len(form) >= _LONG else rf"(?<![^\W_]){pattern}(?![^\W_])"
