"""Speed and memory of the backends, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_distill.report.charts.sheet import Sheet, style
from mlx_distill.report.palette import TEXT, ink
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
        _panel(left, names, medians, colours, "Real tokens a second", [f"{value:,.0f}" for value in medians])
        left.errorbar(medians, range(len(bars)), xerr=reach, fmt="none", ecolor=TEXT, elinewidth=1.4, capsize=4)
        sizes = [bar.memory / 1e9 for bar in bars]
        _panel(right, names, sizes, colours, "Peak memory of the process, GB", [f"{value:.2f}" for value in sizes])
        sheet.save(path)


def _panel(
    axes: Any, names: Sequence[str], values: Sequence[float], colours: Sequence[str], title: str, labels: Sequence[str]
) -> None:
    axes.set_title(title, loc="left", fontsize=13.5, fontweight="bold", pad=12)
    bars = axes.barh(range(len(names)), values, color=colours, height=0.6)
    axes.bar_label(bars, labels, padding=12, fontsize=13, fontweight="bold")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.2)
