"""Cost against the number of prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from mlx_distill.report import findings
from mlx_distill.report.charts.sheet import Sheet, style
from mlx_distill.report.cost import SCALES, CostScaling
from mlx_distill.report.palette import LIGHT, Theme, ink
from mlx_distill.report.wording import money, prompts_at_scale, shorten

_HOLLOW: dict[str, Any] = {"markerfacecolor": "none", "markeredgewidth": 2, "markersize": 8}
_DASHES = (0, (4, 2))


def cost_scaling(path: Path, scaling: CostScaling, theme: Theme = LIGHT) -> None:
    """Cost against the number of prompts, both axes logarithmic."""
    with style(theme):
        sheet = Sheet(findings.cost_finding(scaling), scaling.basis, 5.0, foot=scaling.projection, theme=theme)
        if scaling.of_teacher:
            axes = sheet.figure.subplots()
            _teacher_lines(axes, scaling, theme)
        else:
            axes, side = sheet.figure.subplots(1, 2, width_ratios=[1.4, 1])
            _listed_lines(axes, side, scaling, theme)
        _cost_axes(axes, scaling)
        axes.legend(handles=_cost_legend(scaling, theme), loc="upper left")
        sheet.save(path)


def _teacher_lines(axes: Any, scaling: CostScaling, theme: Theme) -> None:
    """The teacher itself, online and in batches, each point with its price."""
    colour = theme.colour(ink("teacher"))
    model = scaling.models[0]
    for batch, marker, dashes, above in ((False, "o", "-", 12), (True, "s", _DASHES, -22)):
        costs = [model.cost(scaling.averages, n, batch=batch) for n in SCALES]
        axes.plot(SCALES, costs, color=colour, linewidth=2.4, marker=marker, linestyle=dashes, **_HOLLOW)
        text: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "color": colour}
        for n, dollars in zip(SCALES, costs, strict=True):
            weight = "normal" if batch else "bold"
            axes.annotate(money(dollars), (n, dollars), xytext=(0, above), fontweight=weight, **text)
    if scaling.spent:
        axes.plot([scaling.spent.prompts], [scaling.spent.dollars], "*", color=theme.text, markersize=20, zorder=5)


def _listed_lines(axes: Any, side: Any, scaling: CostScaling, theme: Theme) -> None:
    """Every listed model, its name and price in a small table beside the plot."""
    side.set_axis_off()
    top, spacing = 0.86, 0.065  # of the axes' height
    columns = (0.1, 0.72, 0.98)
    heads = (f"{prompts_at_scale(SCALES[-1])} prompts", "online", "batch")
    for x, text, ha in zip(columns, heads, ("left", "right", "right"), strict=True):
        side.text(x, top + spacing, text, ha=ha, va="center", fontsize=12, color=theme.muted)
    for rank, model in enumerate(scaling.models):
        colour = theme.listed_models[rank % len(theme.listed_models)]
        costs = [model.cost(scaling.averages, n) for n in SCALES]
        axes.plot(SCALES, costs, color=colour, linewidth=2.4, marker="o", **_HOLLOW)
        y = top - rank * spacing
        leader = side.annotate(
            "", (SCALES[-1], costs[-1]), (columns[0], y), xycoords=axes.transData, textcoords=side.transAxes,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1, "shrinkA": 4, "shrinkB": 6},
        )  # fmt: skip
        leader.set_in_layout(False)
        batch = model.cost(scaling.averages, SCALES[-1], batch=True)
        side.text(columns[0], y, shorten(model.name, 20), va="center", fontsize=12, fontweight="bold", color=colour)
        for x, dollars in zip(columns[1:], (costs[-1], batch), strict=True):
            side.text(x, y, money(dollars), ha="right", va="center", fontsize=12, color=colour)


def _cost_axes(axes: Any, scaling: CostScaling) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(SCALES))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: prompts_at_scale(round(v))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"${v:,.0f}" if v >= 1 else f"${v:g}"))
    axes.set_xlabel("prompts")
    axes.set_xlim(50, SCALES[-1] * (2.5 if scaling.of_teacher else 1.3))
    axes.margins(y=0.12)


def _cost_legend(scaling: CostScaling, theme: Theme) -> list[Line2D]:
    def mark(marker: str, text: str, dashes: Any = "-") -> Line2D:
        return Line2D(
            [],
            [],
            color=theme.muted,
            marker=marker,
            markerfacecolor=theme.ground,
            markeredgewidth=2,
            linestyle=dashes,
            label=text,
        )

    handles = [mark("o", "projected, online")]
    if scaling.of_teacher:
        handles.append(mark("s", "projected, in batches", _DASHES))
    if scaling.spent:
        text = f"measured: {money(scaling.spent.dollars)} for {scaling.spent.prompts:,} prompts"
        handles.append(Line2D([], [], color=theme.text, marker="*", markersize=15, linestyle="none", label=text))
    return handles
