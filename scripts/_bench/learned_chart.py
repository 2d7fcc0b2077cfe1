"""What students learned, as a chart: how far each is from the text, and how far from the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.ticker import MaxNLocator

from _bench.learned import TEXT, UNTRAINED, Learned, Measure, mean
from mlx_distill.report.charts.sheet import Sheet, style
from mlx_distill.report.palette import LIGHT, Ink, Theme, ink
from mlx_distill.report.wording import plain

#: Of a row, in points: the mean's marker and each seed's.
_MEAN, _SEED = 11, 5

#: Share of a panel's width that a figure's label takes.
_LABEL = 0.22


def draw(path: Path, learned: Learned, theme: Theme = LIGHT) -> None:
    """Two panels with the same rows: a line from where the untrained student stands to where the trained one does.

    Raises:
        InputError: Nothing was trained.
        ResourceError: It cannot be written.
    """
    title = learned.finding(path)
    rows = len(learned.ways())
    several = max(map(len, learned.found.values())) > 1
    seeds = " Large: the mean of the seeds, small: each of them." if several else ""
    subtitle = f"{learned.about()}. On held-out rows, in nats a token; left is nearer.{seeds}"
    with style(theme):
        foot = f"scripts/distill_table, {learned.machine}, {learned.date}"
        sheet = Sheet(title, subtitle, 1.25 + 0.56 * rows, foot=plain(foot), theme=theme)
        left, right = sheet.figure.subplots(1, 2, sharey=True)
        _panel(left, learned, "loss", "From the text: cross-entropy", theme)
        _panel(right, learned, "apart", "From the teacher: forward KL", theme)
        left.set_yticks(range(rows), [plain(name) for name in learned.ways()])
        for tick in left.get_yticklabels():
            tick.set_color(theme.text)
        head: dict[str, Any] = {"xycoords": ("figure fraction", "axes fraction"), "textcoords": "offset points"}
        left.annotate("Learned from", (0.02, 1), xytext=(0, 12), va="baseline", color=theme.muted, **head)
        left.set_ylim(rows - 0.45, -0.55)
        sheet.save(path)


def _panel(axes: Any, learned: Learned, of: Measure, title: str, theme: Theme) -> None:
    found = [(name, own) for name, own in learned.found.items() if own]
    start = mean(learned.found[UNTRAINED], of) if learned.found.get(UNTRAINED) else None
    values = [getattr(figures, of) for _, own in found for figures in own]
    reach = (max(values) - min(values)) or 1.0
    if start is not None:
        axes.axvline(start, color=theme.colour(ink("base")), linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
    for y, (name, own) in enumerate(found):
        drawn = _ink(name)
        colour, middle = theme.colour(drawn), mean(own, of)
        if start is not None:
            axes.plot([start, middle], [y, y], color=colour, linewidth=2.4, zorder=2, solid_capstyle="butt")
        seeds = [getattr(figures, of) for figures in own]
        if len(seeds) > 1:
            # Below the mean's marker, which covers them where they are alike.
            rim: dict[str, Any] = {"markeredgecolor": theme.ground, "markeredgewidth": 0.6, "markersize": _SEED}
            axes.plot(seeds, [y + 0.24] * len(seeds), "o", color=colour, zorder=3, **rim)
        axes.plot([middle], [y], drawn.marker, color=colour, markersize=_MEAN, zorder=4)
        # Beyond the end of the line, so that it crosses nothing of its row.
        left = start is not None and middle < start
        place: dict[str, Any] = {"xytext": (-11 if left else 11, 0), "textcoords": "offset points", "va": "center"}
        place["bbox"] = {"facecolor": theme.ground, "edgecolor": "none", "pad": 1}
        axes.annotate(
            f"{middle:.3f}", (middle, y), ha="right" if left else "left", fontsize=13, fontweight="bold",
            color=colour, zorder=3.5, **place,
        )  # fmt: skip
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold", pad=12)
    axes.set_xlim(min(values) - (_LABEL + 0.08) * reach, max(values) + (_LABEL + 0.08) * reach)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


def _ink(name: str) -> Ink:
    """The untrained student is the base; what learned from the teacher has the teacher's colour and marker."""
    return ink({UNTRAINED: "base", TEXT: "distilled"}.get(name, "teacher"))
