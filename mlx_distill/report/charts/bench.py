"""Speed and memory of the backends, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_distill.report.charts.sheet import Sheet, style
from mlx_distill.report.palette import LIGHT, ink
from mlx_distill.report.wording import plain


@dataclass(frozen=True)
class Bar:
    """One backend.

    Attributes:
        speed: Real tokens a second: median, least, most.
        memory: Bytes at most.
    """

    name: str
    speed: tuple[float, float, float]
    memory: int


def bench_bars(path: Path, bars: Sequence[Bar], *, title: str, subtitle: str, foot: str) -> None:
    """Two panels of bars: the first backend in the colour of what is ours, the others in that of what it is held to."""
    with style():
        sheet = Sheet(title, plain(subtitle), 0.9 + 0.62 * len(bars), foot=plain(foot))
        left, right = sheet.figure.subplots(1, 2)
        names = [plain(bar.name) for bar in bars]
        colours = [ink("distilled" if at == 0 else "base").light for at in range(len(bars))]
        medians = [bar.speed[0] for bar in bars]
        reach = [[bar.speed[0] - bar.speed[1] for bar in bars], [bar.speed[2] - bar.speed[0] for bar in bars]]
        ends = [bar.speed[2] for bar in bars]
        _panel(left, names, medians, colours, "Real tokens a second", [f"{value:,.0f}" for value in medians], ends)
        left.errorbar(medians, range(len(bars)), xerr=reach, fmt="none", ecolor=LIGHT.text, elinewidth=1.4, capsize=4)
        sizes = [bar.memory / 1e9 for bar in bars]
        _panel(
            right, names, sizes, colours, "Peak memory of the process, GB", [f"{value:.2f}" for value in sizes], sizes
        )
        sheet.save(path)


def _panel(
    axes: Any,
    names: Sequence[str],
    values: Sequence[float],
    colours: Sequence[str],
    title: str,
    labels: Sequence[str],
    ends: Sequence[float],
) -> None:
    """Bars, each with its label beyond the end of what is drawn."""
    axes.set_title(title, loc="left", fontsize=13.5, fontweight="bold", pad=12)
    axes.barh(range(len(names)), values, color=colours, height=0.6)
    text: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 13, "fontweight": "bold"}
    for at, (label, end) in enumerate(zip(labels, ends, strict=True)):
        axes.annotate(label, (end, at), xytext=(10, 0), **text)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, max(ends) * 1.25)
