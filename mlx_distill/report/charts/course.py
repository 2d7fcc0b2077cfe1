"""Training curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from mlx_distill.report import findings
from mlx_distill.report.charts.sheet import Sheet, style
from mlx_distill.report.evidence import Evidence
from mlx_distill.report.palette import LIGHT, Theme, ink
from mlx_distill.report.training import Course, epoch_ends, smooth
from mlx_distill.report.wording import loss, percent, plain
from mlx_distill.run_records import MetricRow

_TITLES = {
    "loss": "Loss (nats a token)",
    "token_accuracy": "Token accuracy",
    "divergence": "Divergence from the teacher (nats a token)",
}


def training_curves(path: Path, course: Course, evidence: Evidence, theme: Theme = LIGHT) -> None:
    """Loss, token accuracy, the divergence minimised: every step's own batch, each evaluation of the held-out split."""
    finding = findings.training_finding(course) or "Training in progress: not yet enough to compare."
    run = evidence.run
    model = plain(run.model.name if run else "student")
    about = f"{model}, LoRA. Only the answers' tokens count, not the prompts'."
    rows = [["loss", "token_accuracy"]]
    if any(row.divergence is not None for row in (*course.of_rows, *course.valid)):
        rows.append(["divergence", "divergence"])
        about += f" Minimised: {course.minimised.name}." if course.minimised else ""
    with style(theme):
        sheet = Sheet(finding, about, 4.9 * len(rows), theme=theme)
        panels = sheet.figure.subplot_mosaic(rows)
        for field, axes in panels.items():
            _course_panel(axes, course, _TITLES[field], field, theme)
        panels["token_accuracy"].yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v * 100:.0f} %"))
        sheet.save(path)


def _course_panel(axes: Any, course: Course, title: str, field: str, theme: Theme) -> None:
    student, before = theme.colour(ink("distilled")), theme.colour(ink("base"))
    show = percent if field == "token_accuracy" else loss
    axes.set_title(title, loc="left", fontsize=13.5, fontweight="bold", pad=28)
    handles = []
    steps, valid = _known(course.of_rows, field), _known(course.valid, field)
    if steps:
        x = [row.step for row in steps]
        y = [getattr(row, field) for row in steps]
        axes.plot(x, y, color=before, alpha=0.35, linewidth=1)
        window = max(1, len(y) // 12)
        name = f"{course.steps_title}, mean of {window} steps" if window > 1 else f"{course.steps_title}, each step"
        handles += axes.plot(x, smooth(y, window), color=before, linewidth=2, label=name)
    if valid:
        x = [row.step for row in valid]
        y = [getattr(row, field) for row in valid]
        handles += axes.plot(x, y, color=student, linewidth=2.6, marker="o", markersize=8, label="validation rows")
        first, last = valid[0], valid[-1]
        _label_point(axes, theme, last, field, show(getattr(last, field)), ha="right", xytext=(-8, 13))
        if first.step != last.step:
            # Where the line rises, there is room below its start.
            place = -18 if getattr(last, field) > getattr(first, field) else 10
            _label_point(axes, theme, first, field, show(getattr(first, field)), ha="left", xytext=(8, place))
    if course.best and _known([course.best], field):
        ring: dict[str, Any] = {
            "markersize": 15,
            "markerfacecolor": "none",
            "markeredgecolor": student,
            "markeredgewidth": 1.6,
        }
        handles += axes.plot([course.best.step], [getattr(course.best, field)], "o", **ring, label="adapter kept")
    if course.test and _known([course.test], field):
        # Beside the last step, so that it does not cover the validation's point.
        at = course.test.step + 0.035 * max(row.step for row in (*course.steps, course.test))
        handles += axes.plot(
            [at],
            [getattr(course.test, field)],
            ink("teacher").marker,
            color=theme.text,
            markersize=8,
            label=f"test rows {show(getattr(course.test, field))}",
        )
    ends = epoch_ends(course)
    for number, step in ends if len(ends) <= 12 else []:
        axes.axvline(step, color=theme.line, linewidth=1, linestyle=(0, (2, 3)), zorder=0)
        axes.annotate(
            f"epoch {number}",
            (step, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontsize=11,
            color=theme.muted,
        )
    axes.set_xlabel("optimizer steps")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.margins(x=0.06, y=0.14)
    axes.grid(axis="x", visible=False)
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, columnspacing=1.4)


def _known(rows: Sequence[MetricRow], field: str) -> list[MetricRow]:
    return [row for row in rows if getattr(row, field) is not None]


def _label_point(axes: Any, theme: Theme, row: MetricRow, field: str, text: str, **place: Any) -> None:
    box = {"facecolor": theme.ground, "edgecolor": "none", "alpha": 0.75, "pad": 1}
    axes.annotate(
        text, (row.step, getattr(row, field)), textcoords="offset points", fontsize=12, fontweight="bold", zorder=4,
        color=theme.colour(ink("distilled")), bbox=box, **place,
    )  # fmt: skip
