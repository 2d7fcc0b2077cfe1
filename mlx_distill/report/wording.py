"""How the report writes numbers and foreign text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_distill.stats import Interval

#: What marks the contenders in every text, in the order in which they are shown.
CONTENDER_TITLES: dict[str, str] = {"base": "Base", "distilled": "Distilled", "teacher": "Teacher"}

_TIDY_WHITESPACE = "\n\t"


def title_of(contender: str) -> str:
    """A contender's name at the head of a column."""
    return CONTENDER_TITLES.get(contender, contender)


def score(value: float | None) -> str:
    """A score from 0 to 10; a missing one is a dash, never 0."""
    return "–" if value is None else f"{value:.1f}"


def change(value: float | None) -> str:
    """A difference of two scores with its sign; what rounds to nothing is ±0."""
    if value is None:
        return "–"
    return "±0.0" if abs(value) < 0.05 else f"{value:+.1f}".replace("-", "−")


def signed(value: float | None) -> str:
    """A difference of two means of scores, as exactly as its interval is told."""
    if value is None:
        return "–"
    return "±0.00" if abs(value) < 0.005 else f"{value:+.2f}".replace("-", "−")


def points(value: float | None) -> str:
    """A difference of two shares, in percentage points."""
    if value is None:
        return "–"
    return "±0.0" if abs(value) < 0.0005 else f"{value * 100:+.1f}".replace("-", "−")


def ratio(value: float | None) -> str:
    """A coefficient from −1 to 1."""
    return "–" if value is None else f"{value:.2f}".replace("-", "−")


def nats(value: float | None) -> str:
    """A difference of two losses, in nats a token."""
    if value is None:
        return "–"
    return "±0.000" if abs(value) < 0.0005 else f"{value:+.3f}".replace("-", "−")


def distance(value: float | None) -> str:
    """A divergence in nats; rounding may take what is nothing below it."""
    return "–" if value is None else f"{max(value, 0.0):.3f}"


def perplexity(value: float | None) -> str:
    """A perplexity; one that is beyond all numbers says so."""
    if value is None:
        return "–"
    return f"{value:,.2f}" if value < 1e6 else "over a million"


def span(interval: Interval | None, show: Callable[[float | None], str]) -> str:
    """ "+1.2 to +2.8"; a dash where no interval is known."""
    return "–" if interval is None else f"{show(interval.low)} to {show(interval.high)}"


def percent(share: float | None) -> str:
    """A share from 0 to 1."""
    return "–" if share is None else f"{share * 100:.1f} %"


def loss(value: float | None) -> str:
    """A cross-entropy in nats."""
    return "–" if value is None else f"{value:.3f}"


def count(value: float | None) -> str:
    """A whole number with thousands apart."""
    return "–" if value is None else f"{value:,.0f}"


def plural(number: int, noun: str) -> str:
    """ "1 answer", "2 answers"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def money(dollars: float | None) -> str:
    """US dollars, with as many digits as mean something."""
    if dollars is None:
        return "–"
    if 0 < dollars < 0.01:
        return f"${dollars:.4f}"
    return f"${dollars:,.2f}" if dollars < 100 else f"${dollars:,.0f}"


def duration(seconds: float | None) -> str:
    """Wall time in the two units that matter."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def gigabytes(size: float | None) -> str:
    """Bytes as GB (10^9)."""
    return "–" if size is None else f"{size / 1e9:.1f} GB"


def prompts_at_scale(number: int) -> str:
    """ "104", "10 thousand", "16 million"."""
    for size, word in ((1_000_000, "million"), (1_000, "thousand")):
        if number >= size and number % size == 0:
            return f"{number // size} {word}"
    return f"{number:,}"


def visible(text: str) -> str:
    """Text in which nothing is hidden: control, format and lone surrogate characters become signs.

    A terminal escape, a right-to-left override or a NUL inside an answer is then seen, and changes nothing else.
    """
    return "".join(_sign(c) if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text)


def _sign(character: str) -> str:
    if character in _TIDY_WHITESPACE:
        return character
    code = ord(character)
    if character == "\N{ZERO WIDTH JOINER}":  # joins emoji and letters of many scripts
        return character
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"


def code_cell(text: str) -> str:
    """Foreign text as a code span that can stand in a Markdown table."""
    return "`" + re.sub(r"\s+", " ", visible(text)).replace("`", "'").replace("|", "\\|") + "`"


def plain_cell(text: str) -> str:
    """Foreign text as plain words that can stand in a Markdown table: nothing in it is markup."""
    return re.sub(r"([\\`*_{}\[\]<>|#~])", r"\\\1", re.sub(r"\s+", " ", visible(text)))


def plain(text: str) -> str:
    """Text in the letters that the charts' font has for certain; any other is a question mark."""
    return "".join(c if c in "–…−±" or " " <= c <= "~" else "?" for c in text)


def shorten(text: str, width: int) -> str:
    """Plain text of at most `width` letters, its middle left out."""
    text = plain(text)
    return text if len(text) <= width else f"{text[: width // 2 - 1]}…{text[-(width // 2) :]}"
