"""The shape of a scorecard: one axis a dimension. The table beside it says the same in numbers."""

from __future__ import annotations

import math

from markupsafe import Markup

from mlx_distill.report.evidence import Evidence
from mlx_distill.report.palette import slot
from mlx_distill.report.scores import Scorecard, dimension_title
from mlx_distill.report.wording import score, shorten, title_of

WIDTH, HEIGHT, RADIUS = 500, 300, 115
_FEWEST_AXES = 3


def radar(card: Scorecard, evidence: Evidence) -> Markup:
    """Draw it; nothing where there are fewer than three dimensions."""
    names = [d for d, means in card.dimensions.items() if means]
    if len(names) < _FEWEST_AXES:
        return Markup("")
    parts = [Markup('<polygon class="web" points="{}"/>').format(_ring([ring] * len(names))) for ring in (2.5, 5, 7.5)]
    parts.append(Markup('<polygon class="web rim" points="{}"/>').format(_ring([10.0] * len(names))))
    for at, name in enumerate(names):
        x, y = _point(at, 10, len(names))
        parts.append(Markup('<line class="web" x1="{}" y1="{}" x2="{}" y2="{}"/>').format(*_point(at, 0, 1), x, y))
        label_x, label_y = _point(at, 11.4, len(names))
        side = "middle" if abs(label_x - WIDTH / 2) < 12 else "start" if label_x > WIDTH / 2 else "end"
        title = shorten(dimension_title(name), 20)
        parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="{}">{}</text>').format(
            label_x, label_y + 4, side, title))  # fmt: skip
    shown = [c for c in evidence.contenders if all(c in card.dimensions[d] for d in names)]
    said = []
    # The student on top: its shape is what the page is about.
    for contender in sorted(shown, key=lambda c: (c == "distilled", c == "base")):
        values = [card.dimensions[d][contender].value for d in names]
        parts.append(Markup('<polygon class="shape {}" points="{}"/>').format(
            slot(contender, evidence.contenders), _ring(values)))  # fmt: skip
    for contender in shown:
        numbers = (f"{dimension_title(d)} {score(card.dimensions[d][contender].value)}" for d in names)
        said.append(f"{title_of(contender)}: {', '.join(numbers)}.")
    return Markup('<svg class="radar" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, " ".join(said), Markup("").join(parts)
    )


def _ring(values: list[float]) -> str:
    return " ".join("{},{}".format(*_point(at, value, len(values))) for at, value in enumerate(values))


def _point(at: int, value: float, axes: int) -> tuple[float, float]:
    angle = 2 * math.pi * at / axes - math.pi / 2
    reach = RADIUS * value / 10
    return round(WIDTH / 2 + reach * math.cos(angle), 1), round(HEIGHT / 2 + 6 + reach * math.sin(angle), 1)
