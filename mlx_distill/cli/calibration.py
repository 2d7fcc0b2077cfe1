"""What `mlx-distill judge --calibrate` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mlx_distill.calibration import Calibration, JudgeCalibration
from mlx_distill.cli.console import Summary
from mlx_distill.config import JudgeConfig
from mlx_distill.layout import ComparisonFolder

_NAMES_SHOWN = 5
_HEAD = ("", "n", "Pearson", "Spearman", "kappa", "judge - human")


def summarise_calibration(found: Calibration, config: JudgeConfig) -> Summary:
    """A table of how far each judge agrees with the labels, and what labels were left out."""
    lines = [f"{found.rows} labels in {found.labels}."]
    for kind, unknown in (("prompts", found.unknown_prompts), ("contenders", found.unknown_contenders)):
        if unknown:
            names = ", ".join(list(unknown)[:_NAMES_SHOWN])
            more = f" and {len(unknown) - _NAMES_SHOWN} more" if len(unknown) > _NAMES_SHOWN else ""
            lines.append(f"{sum(unknown.values())} are of unknown {kind}: {names}{more}.")
    scored = [row for judge in found.judges for row in _score_rows(judge)]
    if scored:
        lines += ["", *_columns([_HEAD, *scored])]
    paired = [
        (judge.judge, str(judge.pairs.n), _number(judge.pairs.agreement), _number(judge.pairs.kappa))
        for judge in found.judges
        if judge.pairs is not None
    ]
    if paired:
        lines += ["", *_columns([("Pairs", "n", "agreement", "kappa"), *paired])]
    lines += [
        "",
        "kappa is Cohen's, of scores with quadratic weights on whole numbers; - is not defined.",
        f"Written to {ComparisonFolder(config.comparison).calibration}.",
    ]
    return Summary({"comparison": str(config.comparison), **found.model_dump(mode="json")}, lines)


def _score_rows(judge: JudgeCalibration) -> Iterator[tuple[str, ...]]:
    for name, row in ((judge.judge, judge.overall), *((f"  {key}", value) for key, value in judge.dimensions.items())):
        if row.n or name == judge.judge:
            gap = "-" if row.gap is None else f"{row.gap:+.2f}"
            yield name, str(row.n), _number(row.pearson), _number(row.spearman), _number(row.kappa), gap


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return [
        "  ".join([f"{row[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
