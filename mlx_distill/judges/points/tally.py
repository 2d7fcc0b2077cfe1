"""Points being added up, and what several languages are scored by."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from mlx_distill.code_blocks import lines_of
from mlx_distill.judges.evidence import Evidence

#: Words by which a text names what can go wrong, and limits.
FAILURES = re.compile(
    r"\b(?:rais\w+|error\w*|exception\w*|invalid\w*|empty|missing|null|fail\w*|edge cases?|limit\w*|overflow\w*"
    r"|time-?outs?|conflict\w*|deadlock\w*|abort\w*|retr(?:y|ies)|crash\w*|thread-safe|corrupt\w*|anomal\w+"
    r"|reject\w*|refus\w+|negative|duplicate\w*|race\w*|wrong|lost|risk\w*|unbalanced|caveat\w*|exceed\w*)\b",
    re.IGNORECASE,
)


@dataclass
class Tally:
    """The points of one dimension with what brought them."""

    points: float = 0.0
    found: list[str] = field(default_factory=list)

    def add(self, points: float, what: str) -> None:
        """Count what was found, or note it where it brings nothing."""
        self.points += points
        self.found.append(f"{what} ({points:+.4g})" if points else what)

    def up_to(self, most: float, share: float, what: str) -> None:
        """Count a share of the points, 0 to 1."""
        self.add(round(most * min(1.0, max(0.0, share)), 2), what)

    def lacks(self, what: str) -> None:
        """Note what would have brought points."""
        self.found.append(f"no {what}")

    def have(self, points: float, condition: bool, what: str) -> None:
        """Count what is there, or note that it is not."""
        if condition:
            self.add(points, what)
        else:
            self.lacks(what)


Tallies = dict[str, Tally]


def failures_named(tally: Tally, evidence: Evidence, most: float) -> None:
    """Points for a text that names what can go wrong: in full for three kinds."""
    kinds = {match.lower()[:5] for match in FAILURES.findall(evidence.prose)}
    tally.up_to(most, len(kinds) / 3, f"text names {len(kinds)} kinds of failure or limit")


def text_around(tally: Tally, evidence: Evidence) -> None:
    """Points for text, and for where it stands: before and after the code."""
    tally.up_to(2, evidence.words / 45, f"{evidence.words} words of text")
    if evidence.blocks:
        lines = lines_of(evidence.text)
        before = "\n".join(lines[: evidence.blocks[0].start])
        after = "\n".join(lines[evidence.blocks[-1].end :])
        tally.have(1, bool(re.search(r"\w+\W+\w+", before)), "text before the code")
        tally.have(1, bool(re.search(r"\w+\W+\w+", after)), "text after the code")


def laid_out(code: str, *, keywords: str) -> Tally:
    """Structure as far as the layout of code shows it."""
    tally = Tally()
    lines = [line for line in code.splitlines() if line.strip()]
    starts = len(re.findall(keywords, code, re.MULTILINE | re.IGNORECASE))
    tally.up_to(4, starts / 5, f"{starts} clauses or declarations at the start of a line")
    tally.up_to(2, len(lines) / 6, f"{len(lines)} lines of code")
    wide = sum(len(line) > 110 for line in lines)
    tally.add(0 if wide else 2, f"{wide} lines over 110 characters" if wide else "no line over 110 characters")
    indented = sum(line[:1].isspace() for line in lines)
    tally.have(2, indented > 0, "indentation")
    return tally


def distinct(pattern: str, text: str) -> set[str]:
    """The different matches of a pattern, whatever their case."""
    return {re.sub(r"\s+", " ", match.upper()) for match in re.findall(pattern, text, re.IGNORECASE)}
