"""One set of colours for every chart and for the page.

Teacher, base and distilled keep their colour everywhere. Blue, vermilion and grey (after Okabe and Ito, "Color
Universal Design", 2008) stay apart for the common kinds of colour blindness, and each also has its own marker.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ink:
    """How one contender is drawn.

    Attributes:
        light: On a light ground, as #RRGGBB.
        dark: On a dark ground.
        marker: matplotlib's letter of its marker.
    """

    light: str
    dark: str
    marker: str


CONTENDERS: dict[str, Ink] = {
    "base": Ink("#727B89", "#98A2B3", "o"),
    "distilled": Ink("#CF4F00", "#FF9550", "o"),
    "teacher": Ink("#0069A8", "#62B6F2", "D"),
}
OTHER = Ink("#7A4FA3", "#C9A2EE", "s")

#: Models listed for their price alone, dearest first; none is a contender's colour.
LISTED_MODELS = ("#3A2A6B", "#5F4B9C", "#8668B8", "#1F6F6A", "#2B8A7E")

#: Neutral colours of the charts, which are drawn on a light ground.
GROUND = "#FFFFFF"
TEXT = "#1B1E24"
MUTED = "#5B6370"
LINE = "#D9DCE2"
FAINT = "#F0F1F4"


def ink(contender: str) -> Ink:
    """The colours and marker of a contender."""
    return CONTENDERS.get(contender, OTHER)
