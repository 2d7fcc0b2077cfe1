"""Training curves."""

from __future__ import annotations

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


def training_curves(path: Path, course: Course, evidence: Evidence, theme: Theme = LIGHT) -> None:
    """Loss and token accuracy: every step's own batch, and each evaluation of the held-out split."""
    finding = findings.training_finding(course) or "Training in progress: not yet enough to compare."
    run = evidence.run
    model = plain(run.model.name if run else "student")
    with style(theme):
        sheet = Sheet(finding, f"{model}, LoRA. Only the answers' tokens count, not the prompts'.", 4.9, theme=theme)
        left, right = sheet.figure.subplots(1, 2)
        _course_panel(left, course, "Loss (nats a token)", "loss", theme)
        _course_panel(right, course, "Token accuracy", "token_accuracy", theme)
        right.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v * 100:.0f} %"))
        sheet.save(path)


def _course_panel(axes: Any, course: Course, title: str, field: str, theme: Theme) -> None:
    student, before = theme.colour(ink("distilled")), theme.colour(ink("base"))
    show = loss if field == "loss" else percent
    axes.set_title(title, loc="left", fontsize=13.5, fontweight="bold", pad=28)
    handles = []
    if course.steps:
        x = [row.step for row in course.steps]
        y = [getattr(row, field) for row in course.steps]
        axes.plot(x, y, color=before, alpha=0.35, linewidth=1)
        window = max(1, len(y) // 12)
        name = f"training rows, mean of {window} steps" if window > 1 else "training rows, each step"
        handles += axes.plot(x, smooth(y, window), color=before, linewidth=2, label=name)
    if course.valid:
        x = [row.step for row in course.valid]
        y = [getattr(row, field) for row in course.valid]
        handles += axes.plot(x, y, color=student, linewidth=2.6, marker="o", markersize=8, label="validation rows")
        first, last = course.valid[0], course.valid[-1]
        _label_point(axes, theme, last, field, show(getattr(last, field)), ha="right", xytext=(-8, 13))
        if first.step != last.step:
            # Where the line rises, there is room below its start.
            place = -18 if getattr(last, field) > getattr(first, field) else 10
            _label_point(axes, theme, first, field, show(getattr(first, field)), ha="left", xytext=(8, place))
    if course.best:
        ring: dict[str, Any] = {
            "markersize": 15,
            "markerfacecolor": "none",
            "markeredgecolor": student,
            "markeredgewidth": 1.6,
        }
        handles += axes.plot([course.best.step], [getattr(course.best, field)], "o", **ring, label="adapter kept")
    if course.test:
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


def _label_point(axes: Any, theme: Theme, row: MetricRow, field: str, text: str, **place: Any) -> None:
    box = {"facecolor": theme.ground, "edgecolor": "none", "alpha": 0.75, "pad": 1}
    axes.annotate(
        text, (row.step, getattr(row, field)), textcoords="offset points", fontsize=12, fontweight="bold", zorder=4,
        color=theme.colour(ink("distilled")), bbox=box, **place,
    )  # fmt: skip
