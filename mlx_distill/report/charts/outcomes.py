"""What hidden tests say: pass@1 by contender with its interval, and by family of tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, MultipleLocator

from mlx_distill.report.charts.scores import key_of, whisker
from mlx_distill.report.charts.sheet import Sheet, style
from mlx_distill.report.evidence import Evidence
from mlx_distill.report.objective import Objective
from mlx_distill.report.palette import LIGHT, Theme, ink
from mlx_distill.report.wording import percent, plain, plural, shorten, title_of

#: More families than these show those with the most tasks.
MOST_FAMILIES = 24


def objective(path: Path, results: Objective, evidence: Evidence, title: str, theme: Theme = LIGHT) -> None:
    """Bars of pass@1 with their intervals on the left, a row a family on the right.

    Args:
        title: The finding.
    """
    families = sorted(results.families, key=lambda name: -results.families[name].tasks)[:MOST_FAMILIES]
    height = max(4.6, 1.2 + 0.42 * len(families))
    known = any(tested.pass_1.interval for tested in results.contenders.values())
    lines = " Lines: 95 % intervals over families of tasks." if known else " Too few families for intervals."
    subtitle = f"pass@1 on hidden tests: {plural(len(results.tasks), 'task')}, {len(results.families)} families.{lines}"
    with style(theme):
        sheet = Sheet(title, subtitle, height, key=key_of(evidence, theme), theme=theme)
        left, right = sheet.figure.subplots(1, 2, width_ratios=[1, 1.25])
        _bars(left, results, evidence, theme)
        _rows(right, results, families, evidence, theme)
        sheet.save(path)


def _bars(axes: Any, results: Objective, evidence: Evidence, theme: Theme) -> None:
    for x, (contender, tested) in enumerate(results.contenders.items()):
        colour, mean = theme.colour(ink(contender, evidence.contenders)), tested.pass_1
        axes.bar(x, mean.value * 100, 0.62, color=colour)
        whisker(axes, x, mean, theme, times=100)
        top = mean.interval.high if mean.interval else mean.value
        place: dict[str, Any] = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center"}
        axes.annotate(percent(mean.value), (x, top * 100), fontsize=15, fontweight="bold", color=colour, **place)
    axes.set_xticks(range(len(results.contenders)), [shorten(title_of(c), 14) for c in results.contenders])
    for tick in axes.get_xticklabels():
        tick.set_color(theme.text)
        tick.set_rotation(0 if len(results.contenders) <= 4 else 25)
    axes.set_ylim(0, 108)
    axes.yaxis.set_major_locator(MultipleLocator(20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f} %"))
    axes.grid(axis="x", visible=False)
    axes.spines["left"].set_visible(False)


def _rows(axes: Any, results: Objective, families: list[str], evidence: Evidence, theme: Theme) -> None:
    for y, name in enumerate(families):
        means = results.families[name].pass_1
        axes.plot([0, 100], [y, y], color=theme.line, linewidth=1, zorder=1)
        if {"base", "distilled"} <= means.keys():
            ends = [means["base"].value * 100, means["distilled"].value * 100]
            axes.plot(ends, [y, y], color=theme.colour(ink("distilled")), linewidth=3, zorder=2, solid_capstyle="butt")
        # The student is drawn last: where contenders are even, it is seen.
        for contender in sorted(means, key=lambda c: (c == "distilled", c == "base")):
            drawn = ink(contender, evidence.contenders)
            size = {"teacher": 14, "base": 11}.get(contender, 9)
            colour, value = theme.colour(drawn), means[contender].value * 100
            axes.plot([value], [y], drawn.marker, color=colour, markersize=size, zorder=3, clip_on=False)
    names = [f"{shorten(plain(name), 22)} ({results.families[name].tasks})" for name in families]
    axes.set_yticks(range(len(families)), names)
    for tick in axes.get_yticklabels():
        tick.set_color(theme.text)
    axes.set_ylim(len(families) - 0.4, -0.6)
    axes.set_xlim(-3, 103)
    axes.xaxis.set_major_locator(MultipleLocator(20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:.0f} %"))
    axes.grid(visible=False)
    axes.set_title("By family (tasks)", loc="left", fontsize=14, fontweight="bold", pad=10)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
