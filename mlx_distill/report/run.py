"""The step `report`: draw the charts and write the report of a comparison.

Reads:  `visuals/NAME/{comparison.json,generations.jsonl,verdicts.jsonl,outcomes.jsonl,duels.jsonl,heldout.jsonl}`,
        `adapters/RUN/{run.json,metrics.jsonl}`; the same of comparisons that it is set against
Writes: `visuals/NAME/{objective,training_curves,model_scorecard,prompt_comparison,cost_scaling}.png`,
        `visuals/NAME/{pipeline.mmd,results.md,report.html}`

Only the generations must be there. What else is missing is said in the report, and its chart is left out (one of
an earlier report is removed, so that no picture shows what the page does not). Kinds of files that are not asked for
stay as they are.
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
from mlx_distill.report.analysis import Analysis, analyse, headline, objective_finding, overall_means
from mlx_distill.report.evidence import read_evidence
from mlx_distill.report.flow import pipeline
from mlx_distill.report.page import page
from mlx_distill.report.palette import LIGHT, THEMES, Theme
from mlx_distill.report.rivals import with_rivals
from mlx_distill.report.tables import results

#: Raised when a change makes the same evidence give another report.
CODE_FORMAT = 3

CHARTS = ("objective", "training_curves", "model_scorecard", "prompt_comparison", "cost_scaling")


@dataclass(frozen=True)
class ReportFiles:
    """What was written, and what it says.

    Attributes:
        page: None where it was not asked for; so are the others.
        charts: Path of each chart that could be drawn, by name.
        scores: Overall mean by judge and contender.
        passes: pass@1 by contender; empty where nothing was tested.
        unfinished: Answers that did not end by themselves, by contender.
        missing: What a full report would have beside this, in sentences.
    """

    page: Path | None
    results: Path | None
    pipeline: Path | None
    charts: dict[str, Path]
    headline: str
    prompts: int
    scores: dict[str, dict[str, float]]
    passes: dict[str, float]
    unfinished: dict[str, int]
    missing: tuple[str, ...]


def inputs(config: ReportConfig) -> list[Path]:
    """The files that decide what a report says, a run's own aside; those that may be missing only where they are."""
    folder = ComparisonFolder(config.comparison)
    found = [folder.generations, folder.verdicts, folder.record]
    optional = [folder.outcomes, folder.duels, folder.held_out]
    for other in map(ComparisonFolder, config.others):
        optional += [other.generations, other.verdicts, other.record, other.outcomes, other.held_out]
    return [*found, *(path for path in optional if path.exists())]


def outputs(config: ReportConfig) -> list[Path]:
    """The files beside the charts that a report is asked to write."""
    folder = ComparisonFolder(config.comparison)
    page = [folder.report] if "html" in config.kinds else []
    return [*page, *([folder.results, folder.pipeline] if "md" in config.kinds else [])]


def report(config: ReportConfig, progress: Progress = SILENT) -> ReportFiles:
    """Write the report of a comparison.

    Raises:
        InputError: There are no answers yet, a file is not what it claims to be, or a comparison that this one is set
            against has no prompt in common with it.
        FolderError: Another process works in the folder.
        ResourceError: The disk is full.
    """
    evidence = with_rivals(read_evidence(config.comparison), config.others)
    folder = evidence.folder
    writes: dict[Path, Callable[[Analysis], str]] = {}
    if "md" in config.kinds:
        writes |= {folder.pipeline: pipeline, folder.results: results}
    if "html" in config.kinds:
        writes[folder.report] = page
    names = CHARTS if "png" in config.kinds else ()
    with lock(folder.root), progress.task("Drawing the report", total=len(names) + len(writes), unit="files") as bar:
        analysis = analyse(evidence)
        charts: dict[str, Path] = {}
        drawings = drawings_of(analysis, THEMES[config.theme])
        for name in names:
            path = folder.chart(name)
            if name in drawings:
                drawings[name](path)
                charts[name] = path
            else:
                path.unlink(missing_ok=True)
            bar.advance()
        for path, text in writes.items():
            write_text(path, text(analysis))
            bar.advance()
    return _files(folder, analysis, charts, set(writes))


def drawings_of(analysis: Analysis, theme: Theme = LIGHT) -> dict[str, Callable[[Path], None]]:
    """The charts for which there is something to draw, each as a function of the file to write."""
    from mlx_distill.report import charts

    drawings: dict[str, Callable[[Path], None]] = {}
    evidence, course, scored = analysis.evidence, analysis.course, analysis.scored
    if found := analysis.objective:
        title = objective_finding(found)
        drawings["objective"] = partial(charts.objective, results=found, evidence=evidence, title=title, theme=theme)
    if course and (course.steps or course.valid):
        drawings["training_curves"] = partial(charts.training_curves, course=course, evidence=evidence, theme=theme)
    if scored:
        drawings["model_scorecard"] = partial(charts.model_scorecard, cards=scored, evidence=evidence, theme=theme)
        drawings["prompt_comparison"] = partial(charts.prompt_comparison, cards=scored, evidence=evidence, theme=theme)
    if analysis.scaling:
        drawings["cost_scaling"] = partial(charts.cost_scaling, scaling=analysis.scaling, theme=theme)
    return drawings


def _files(folder: ComparisonFolder, analysis: Analysis, charts: dict[str, Path], written: set[Path]) -> ReportFiles:
    evidence, objective = analysis.evidence, analysis.objective
    return ReportFiles(
        page=folder.report if folder.report in written else None,
        results=folder.results if folder.results in written else None,
        pipeline=folder.pipeline if folder.pipeline in written else None,
        charts=charts,
        headline=headline(analysis),
        prompts=len(evidence.prompts),
        scores=overall_means(analysis.cards),
        passes={c: tested.pass_1.value for c, tested in objective.contenders.items()} if objective else {},
        unfinished={c: cut for c, (cut, _) in findings.cut_counts(evidence).items()},
        missing=tuple(note.text for note in analysis.missing),
    )
