"""The step `report`: draw the charts and write the report of a comparison.

Reads:  `visuals/NAME/{comparison.json,generations.jsonl,verdicts.jsonl}`, `adapters/RUN/{run.json,metrics.jsonl}`
Writes: `visuals/NAME/{training_curves,model_scorecard,prompt_comparison,cost_scaling}.png`,
        `visuals/NAME/{pipeline.mmd,results.md,report.html}`

Only the generations must be there. What else is missing is said in the report, and its chart is left out (one of
an earlier report is removed, so that no picture shows what the page does not).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlx_distill.config import ReportConfig
from mlx_distill.layout import ComparisonFolder, lock, write_text
from mlx_distill.progress import SILENT, Progress
from mlx_distill.report import findings
from mlx_distill.report.cost import CostScaling, cost_scaling
from mlx_distill.report.evidence import Evidence, read_evidence
from mlx_distill.report.flow import pipeline
from mlx_distill.report.page import page
from mlx_distill.report.scores import Scorecard, scorecards
from mlx_distill.report.tables import results
from mlx_distill.report.training import Course, course_of

#: Raised when a change makes the same evidence give another report.
CODE_FORMAT = 1

CHARTS = ("training_curves", "model_scorecard", "prompt_comparison", "cost_scaling")


@dataclass(frozen=True)
class ReportFiles:
    """What was written, and what it says.

    Attributes:
        charts: Path of each chart that could be drawn, by name.
        scores: Overall mean by judge and contender.
        unfinished: Answers that did not end by themselves, by contender.
        missing: What a full report would have beside this, in sentences.
    """

    page: Path
    results: Path
    pipeline: Path
    charts: dict[str, Path]
    headline: str
    prompts: int
    scores: dict[str, dict[str, float]]
    unfinished: dict[str, int]
    missing: tuple[str, ...]


def report(config: ReportConfig, progress: Progress = SILENT) -> ReportFiles:
    """Write the report of a comparison.

    Raises:
        InputError: There are no answers yet, or a file is not what it claims to be.
        FolderError: Another process works in the folder.
        ResourceError: The disk is full.
    """
    evidence = read_evidence(config.comparison)
    folder = evidence.folder
    cards, course, scaling = scorecards(evidence), course_of(evidence), cost_scaling(evidence)
    with lock(folder.root), progress.task("Drawing the report", total=len(CHARTS) + 3, unit="files") as bar:
        charts: dict[str, Path] = {}
        drawings = drawings_of(evidence, cards, course, scaling)
        for name in CHARTS:
            path = folder.chart(name)
            if name in drawings:
                drawings[name](path)
                charts[name] = path
            else:
                path.unlink(missing_ok=True)
            bar.advance()
        write_text(folder.pipeline, pipeline(evidence, cards))
        bar.advance()
        write_text(folder.results, results(evidence, cards, course, scaling))
        bar.advance()
        write_text(folder.report, page(evidence, cards, course, scaling))
        bar.advance()
    return _files(folder, evidence, cards, course, charts)


def drawings_of(
    evidence: Evidence, cards: tuple[Scorecard, ...], course: Course | None, scaling: CostScaling | None
) -> dict[str, Callable[[Path], None]]:
    """The charts for which there is something to draw, each as a function of the file to write."""
    from mlx_distill.report import charts

    drawings: dict[str, Callable[[Path], None]] = {}
    scored = tuple(card for card in cards if card.overall)
    if course and (course.steps or course.valid):
        drawings["training_curves"] = partial(charts.training_curves, course=course, evidence=evidence)
    if scored:
        drawings["model_scorecard"] = partial(charts.model_scorecard, cards=scored, evidence=evidence)
        drawings["prompt_comparison"] = partial(charts.prompt_comparison, cards=scored, evidence=evidence)
    if scaling:
        drawings["cost_scaling"] = partial(charts.cost_scaling, scaling=scaling)
    return drawings


def _files(
    folder: ComparisonFolder,
    evidence: Evidence,
    cards: tuple[Scorecard, ...],
    course: Course | None,
    charts: dict[str, Path],
) -> ReportFiles:
    return ReportFiles(
        page=folder.report,
        results=folder.results,
        pipeline=folder.pipeline,
        charts=charts,
        headline=findings.headline(evidence, cards, course),
        prompts=len(evidence.prompts),
        scores={card.judge.spec: {c: mean.value for c, mean in card.overall.items()} for card in cards},
        unfinished={c: cut for c, (cut, _) in findings.cut_counts(evidence).items()},
        missing=tuple(note.text for note in findings.missing(evidence, cards, course)),
    )
