"""Quotes answers to a judging model as material that cannot speak for itself.

An answer is quoted between lines that carry a token made from a hash of the material: no answer can hold the token, so
none can end its own quotation. It is the same for the same material, so that equal questions are equal requests.
Characters that would not be seen are taken out or written as their code, and a very long answer is cut in its middle,
which the question says.
"""

from __future__ import annotations

import re
from functools import lru_cache

from mlx_distill.judges.blind import blinded
from mlx_distill.records import Generation, content_hash

#: Of an answer longer than this many characters (some 12,000 tokens), only the beginning and the end are shown.
MOST_CHARACTERS = 48_000

#: Characters shown of the end of such an answer.
_TAIL = 12_000

#: Nothing is seen of these, but a name is hidden by them.
_INVISIBLE = re.compile("[\u00ad\u200b\u2060\ufeff]")
#: Control characters but tab and line feed, and what turns the direction of writing.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def shown(generation: Generation, names: tuple[str, ...] = ()) -> str:
    """An answer as a judge sees it, whatever its length: without names, and with nothing that is not seen."""
    return _shown(generation.text, tuple(sorted({generation.contender, generation.model, *names})))


@lru_cache(maxsize=64)  # An answer is shown alone and in pairs, one soon after the other.
def _shown(text: str, names: tuple[str, ...]) -> str:
    hidden = blinded(_INVISIBLE.sub("", text), *names)
    return _CONTROL.sub(lambda match: f"<U+{ord(match[0]):04X}>", hidden)


def task_of(generation: Generation) -> str:
    """What was asked, with the system text that it was asked with."""
    prompt = generation.prompt
    return f"{prompt.system}\n\n{prompt.text}" if prompt.system else prompt.text


def token_of(*material: str) -> str:
    """What marks the quotations of this material, and no other."""
    return content_hash(material)[:24]


def quoted(label: str, text: str, token: str) -> str:
    """A quotation.

    Args:
        label: What the lines around it call it, such as "task".
    """
    return f"[{label} {token}]\n{text}\n[end of {label} {token}]\n"


def quoted_answer(label: str, text: str, token: str, *, finished: bool) -> str:
    """The quotation of an answer, shortened where it is too long, and after it what has to be known of it.

    Args:
        finished: Whether it ended by itself.
    """
    notes = []
    if not text.strip():
        notes.append(f"The {label} is empty.")
    if (left_out := len(text) - MOST_CHARACTERS) > 0:
        head = MOST_CHARACTERS - _TAIL
        notes.append(
            f"The {label} has {len(text):,} characters. Shown are its first {head:,} and its last {_TAIL:,}; do not "
            "take what is left out between them for missing."
        )
        text = f"{text[:head]}\n[left out {token}: {left_out:,} characters]\n{text[-_TAIL:]}"
    if not finished:
        notes.append(f"The {label} was cut here: it reached the limit on its length.")
    return quoted(label, text, token) + "".join(f"{note}\n" for note in notes)
