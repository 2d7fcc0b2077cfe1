"""The training curves of the page, with what each point says for those who hover, step by key, or read a table."""

from __future__ import annotations

from markupsafe import Markup

from mlx_distill.report import wording
from mlx_distill.report.figures import Table
from mlx_distill.report.svg import Series, line_chart
from mlx_distill.report.training import Course, smooth


def curves(course: Course) -> list[tuple[str, Markup]]:
    """Loss and token accuracy over the steps."""
    drawn = []
    for title, field, show, tick in (
        ("Loss, nats a token", "loss", wording.loss, lambda v: f"{v:.2f}"),
        ("Token accuracy", "token_accuracy", wording.percent, lambda v: f"{v * 100:g} %"),
    ):
        steps = [(float(row.step), float(getattr(row, field))) for row in course.steps]
        means = smooth([y for _, y in steps], max(1, len(steps) // 12))
        series = [
            Series("training rows", "raw", steps),
            Series("smoothed", "mean", [(x, y) for (x, _), y in zip(steps, means, strict=True)]),
            Series("validation rows", "valid", [(float(r.step), float(getattr(r, field))) for r in course.valid], True),
        ]
        drawn.append((title, line_chart(title, series, show=show, tick=tick, x_name="optimizer steps")))
    return drawn


def points_table(course: Course) -> Table | None:
    """Every evaluation, for those who cannot see the curves; None where there was none."""
    rows = tuple(
        (f"{row.step:,}", f"{row.epoch:.2f}", wording.loss(row.loss), wording.percent(row.token_accuracy))
        for row in course.valid
    )
    if not rows:
        return None
    return Table("Every validation", ("Step", "Epoch", "Validation loss", "Token accuracy"), rows)
