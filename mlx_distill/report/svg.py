"""Curves drawn straight into the page, so that they follow its colours, its width and a phone's.

Only presentation attributes and classes are used: the page's policy refuses inline styles.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 520, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 46
#: More points than a screen has columns say nothing more.
MOST_POINTS = 400

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    Attributes:
        kind: A class of the page's style: "raw", "mean", "valid" or "test".
        dots: Whether each point is marked, and says its value.
    """

    name: str
    kind: str
    points: Sequence[Point]
    dots: bool = False


def line_chart(
    title: str, series: Sequence[Series], *, show: Callable[[float], str], tick: Callable[[float], str], x_name: str
) -> Markup:
    """Draw lines over two linear axes.

    Args:
        show: Writes a value in words, for labels and hover texts.
        tick: Writes a value at the axis.
    """
    series = [s for s in series if s.points]
    if not series:
        return Markup("")
    x_scale = _Scale([x for s in series for x, _ in s.points], LEFT, WIDTH - RIGHT, margin=0.03)
    y_scale = _Scale([y for s in series for _, y in s.points], HEIGHT - BOTTOM, TOP, margin=0.08)
    parts = [Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
        WIDTH - RIGHT, HEIGHT - 4, x_name)]  # fmt: skip
    for value in y_scale.ticks(7):
        y = round(y_scale(value), 1)
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, WIDTH - RIGHT, y, y))
        parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{}</text>').format(
            LEFT - 8, y + 4, tick(value)))  # fmt: skip
    for value in x_scale.ticks(5):
        parts.append(Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            round(x_scale(value), 1), HEIGHT - BOTTOM + 18, f"{value:g}"))  # fmt: skip
    for line in series:
        points = [(round(x_scale(x), 1), round(y_scale(y), 1)) for x, y in thin(line.points)]
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(
            line.kind, " ".join(f"{x},{y}" for x, y in points)))  # fmt: skip
        if line.dots:
            for x, y in line.points:
                parts.append(
                    Markup('<circle class="dot {}" cx="{}" cy="{}" r="5"><title>{}</title></circle>').format(
                        line.kind, round(x_scale(x), 1), round(y_scale(y), 1), f"{line.name}, step {x:g}: {show(y)}"
                    )
                )
            first, last = line.points[0], line.points[-1]
            parts.append(_value(last, x_scale, y_scale, show(last[1]), anchor="end", offset=-11))
            if len(line.points) > 1:
                # Where the line rises, there is room below its start.
                offset = 20 if last[1] > first[1] else -11
                parts.append(_value(first, x_scale, y_scale, show(first[1]), anchor="start", offset=offset))
    parts.append(Markup('<line class="cursor" x1="0" x2="0" y1="{}" y2="{}" visibility="hidden"/>').format(
        TOP, HEIGHT - BOTTOM))  # fmt: skip
    return Markup('<svg class="curve" viewBox="0 0 {} {}" role="img" aria-label="{}" data-points="{}">{}</svg>').format(
        WIDTH, HEIGHT, _spoken(title, series, show), _readings(series, x_scale, show), Markup("").join(parts)
    )


def _spoken(title: str, series: Sequence[Series], show: Callable[[float], str]) -> str:
    """The chart in a sentence a line: where each begins and ends."""
    lines = (
        f"{line.name} from {show(line.points[0][1])} at step {line.points[0][0]:g} to {show(line.points[-1][1])} "
        f"at step {line.points[-1][0]:g}"
        for line in series
    )
    return f"{title}: {'; '.join(lines)}."


def _readings(series: Sequence[Series], x_scale: _Scale, show: Callable[[float], str]) -> str:
    """What the page's script says at each step: [[x in the drawing, text], …] as JSON."""
    said: dict[float, list[str]] = {}
    for line in series:
        for x, y in thin(line.points):
            said.setdefault(x, []).append(f"{line.name} {show(y)}")
    readings = [[round(x_scale(x), 1), f"step {x:,.0f}: {', '.join(said[x])}"] for x in sorted(said)]
    return json.dumps(readings, ensure_ascii=False, separators=(",", ":"))


def _value(point: Point, x_scale: _Scale, y_scale: _Scale, text: str, *, anchor: str, offset: int) -> Markup:
    x = round(x_scale(point[0]), 1) + (8 if anchor == "start" else -4)
    y = round(y_scale(point[1]), 1) + offset
    return Markup('<text class="value" x="{}" y="{}" text-anchor="{}">{}</text>').format(x, y, anchor, text)


def thin(points: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS` points: means of neighbours, the first and the last kept."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MOST_POINTS - 2))
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]
    return [points[0], *means, points[-1]]


class _Scale:
    """A linear scale from values to pixels."""

    def __init__(self, values: Sequence[float], start: float, end: float, *, margin: float) -> None:
        low, high = min(values), max(values)
        room = (high - low) * margin or abs(high) * 0.05 or 1.0
        self.low, self.high = low - room, high + room
        self.start, self.end = start, end

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, wanted: int) -> list[float]:
        """Round values inside the scale, about as many as wanted."""
        rough = (self.high - self.low) / wanted
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough)
        first = math.ceil(self.low / step)
        return [round(i * step, 10) for i in range(first, math.floor(self.high / step) + 1)]
