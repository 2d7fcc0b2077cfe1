"""One set of colours for every chart and for the page.

Teacher, base and distilled keep their colour everywhere. Blue, vermilion and grey (after Okabe and Ito, "Color
Universal Design", 2008) stay apart for the common kinds of colour blindness, and each also has its own marker.
"""

from __future__ import annotations

from collections.abc import Sequence
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
#: Models of other names, in their order; from the seventh on the colours come again, with another marker.
OTHERS = (
    Ink("#114C24", "#7AF69A", "s"),
    Ink("#834243", "#E75F66", "^"),
    Ink("#350D5D", "#A86BFD", "v"),
    Ink("#6D26B8", "#E3D7FB", "P"),
    Ink("#A54A28", "#D5ADA0", "X"),
    Ink("#62345F", "#CA66C3", "h"),
)
_MORE_MARKERS = ("<", ">", "p", "*", "d", "H")

#: Models listed for their price alone, dearest first; none is a contender's colour.
LISTED_MODELS = ("#3A2A6B", "#5F4B9C", "#8668B8", "#1F6F6A", "#2B8A7E")
LISTED_MODELS_DARK = ("#B9A6F5", "#A08BE0", "#8C77C9", "#6FC7C0", "#4FA89F")


@dataclass(frozen=True)
class Theme:
    """The neutral colours that a chart is drawn with, and which of a contender's two inks stands out on them."""

    ground: str
    text: str
    muted: str
    line: str
    faint: str
    dark: bool

    def colour(self, ink: Ink) -> str:
        """Of a contender's ink, the colour for this ground."""
        return ink.dark if self.dark else ink.light

    @property
    def listed_models(self) -> tuple[str, ...]:
        """Colours of models that are listed for their price."""
        return LISTED_MODELS_DARK if self.dark else LISTED_MODELS


LIGHT = Theme("#FFFFFF", "#1B1E24", "#5B6370", "#D9DCE2", "#F0F1F4", dark=False)
DARK = Theme("#14171D", "#EDEFF3", "#AEB6C2", "#3A404B", "#1F242C", dark=True)
THEMES = {"light": LIGHT, "dark": DARK}


def ink(contender: str, order: Sequence[str] = ()) -> Ink:
    """The colours and marker of a contender.

    Args:
        order: All contenders: those of other names have their inks by their place among these.
    """
    if contender in CONTENDERS:
        return CONTENDERS[contender]
    at = _place(contender, order)
    first = OTHERS[at % len(OTHERS)]
    return first if at < len(OTHERS) else Ink(first.light, first.dark, _MORE_MARKERS[at % len(OTHERS)])


def slot(contender: str, order: Sequence[str]) -> str:
    """A contender's class in the page's style: a name that it was given is never one."""
    return contender if contender in CONTENDERS else f"other{_place(contender, order) % len(OTHERS)}"


def _place(contender: str, order: Sequence[str]) -> int:
    others = [name for name in order if name not in CONTENDERS]
    return others.index(contender) if contender in others else 0
