"""The training curves of the page, with what each point says for those who hover, step by key, or read a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from markupsafe import Markup

from mlx_distill.report import findings, wording
from mlx_distill.report.figures import Table
from mlx_distill.report.svg import Point, Series, line_chart
from mlx_distill.report.training import Course, smooth
from mlx_distill.run_records import MetricRow


def curves(course: Course) -> list[tuple[str, Markup]]:
    """Loss and token accuracy over the steps, and the divergence that was minimised where one was."""
    found: list[tuple[str, str, Callable[[float | None], str], Callable[[float], str]]] = [
        ("Loss, nats a token", "loss", wording.loss, lambda v: f"{v:.2f}"),
        ("Token accuracy", "token_accuracy", wording.percent, lambda v: f"{v * 100:g} %"),
    ]
    if course.minimised and points_of((*course.of_rows, *course.valid), "divergence"):
        title = f"Divergence from the teacher, nats a token: {course.minimised.name}, as minimised"
        found.append((title, "divergence", wording.distance, lambda v: f"{v:.2f}"))
    drawn = []
    for title, field, show, tick in found:
        steps = points_of(course.of_rows, field)
        means = smooth([y for _, y in steps], max(1, len(steps) // 12))
        series = [
            Series(course.steps_title, "raw", steps),
            Series("smoothed", "mean", [(x, y) for (x, _), y in zip(steps, means, strict=True)]),
            Series("validation rows", "valid", points_of(course.valid, field), True),
        ]
        drawn.append((title, line_chart(title, series, show=show, tick=tick, x_name="optimizer steps")))
    return drawn


def points_table(course: Course) -> Table | None:
    """Every evaluation, for those who cannot see the curves; None where there was none."""
    rows = [
        (f"{row.step:,}", f"{row.epoch:.2f}", wording.loss(row.loss), wording.percent(row.token_accuracy))
        for row in course.valid
    ]
    if not rows:
        return None
    head = ("Step", "Epoch", "Validation loss", "Token accuracy")
    if course.minimised is None:
        return Table("Every validation", head, tuple(rows))
    apart = [wording.distance(row.divergence) for row in course.valid]
    more = tuple((*row, value) for row, value in zip(rows, apart, strict=True))
    note = findings.minimised_finding(course) or ""
    return Table("Every validation", (*head, "Divergence from the teacher"), more, note=note)


def points_of(rows: Sequence[MetricRow], field: str) -> list[Point]:
    """(step, value) of the rows that have the value."""
    return [(float(row.step), float(y)) for row in rows if (y := getattr(row, field)) is not None]
