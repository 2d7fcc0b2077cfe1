"""What distillation changed of an answer, line by line, as text.

The lines are compared here and shown as text: nothing of an answer is markup, and no code of the page computes it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from markupsafe import Markup

from mlx_distill.report.wording import visible

#: Lines of each answer that are compared; a comparison takes the square of them at worst.
MOST_LINES = 800
#: Equal lines that are shown around a change.
CONTEXT = 3


@dataclass(frozen=True)
class Diff:
    """Two answers line by line.

    Attributes:
        html: Spans of our own classes, one a line.
        added: Lines that only the second has.
        removed: Lines that only the first has.
        cut: Whether lines were left out, since there are too many.
    """

    html: Markup
    added: int
    removed: int
    cut: bool

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not self.added and not self.removed


def diff(before: str, after: str, most: int) -> Diff:
    """Compare two answers.

    Args:
        most: Characters of each that are looked at.
    """
    cut = len(before) > most or len(after) > most
    old, new = (visible(text[:most]).split("\n") for text in (before, after))
    cut = cut or len(old) > MOST_LINES or len(new) > MOST_LINES
    old, new = old[:MOST_LINES], new[:MOST_LINES]
    added = removed = 0
    lines: list[Markup] = []
    matcher = difflib.SequenceMatcher(None, old, new)
    shown = 0
    for group in matcher.get_grouped_opcodes(CONTEXT):
        if skipped := group[0][1] - shown:
            lines.append(_skip(skipped))
        for tag, i1, i2, j1, j2 in group:
            if tag == "equal":
                lines += [_line("same", " ", text) for text in old[i1:i2]]
                continue
            lines += [_line("gone", "−", text) for text in old[i1:i2]]
            lines += [_line("new", "+", text) for text in new[j1:j2]]
            removed, added = removed + i2 - i1, added + j2 - j1
        shown = group[-1][2]
    if lines and shown < len(old):
        lines.append(_skip(len(old) - shown))
    return Diff(Markup("").join(lines), added, removed, cut)


def _line(kind: str, sign: str, text: str) -> Markup:
    tag = {"gone": "del", "new": "ins"}.get(kind, "span")
    return Markup('<{} class="{}">{} {}\n</{}>').format(Markup(tag), kind, sign, text, Markup(tag))


def _skip(lines: int) -> Markup:
    return Markup('<span class="skip-lines">⋯ {} equal line{}\n</span>').format(lines, "" if lines == 1 else "s")
