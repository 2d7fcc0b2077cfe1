"""Everything that a report is drawn from, read once.

Reads: `visuals/NAME/{comparison.json,generations.jsonl,verdicts.jsonl,outcomes.jsonl,duels.jsonl,heldout.jsonl}`,
`visuals/NAME/calibration.json`, `adapters/RUN/{run.json,metrics.jsonl}` (the data set's manifest lies in `run.json`).
Only the generations must be there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mlx_distill.calibration import Calibration
from mlx_distill.errors import InputError
from mlx_distill.layout import ComparisonFolder, RunFolder, file_sha256, read_record, read_rows
from mlx_distill.manifest import Manifest
from mlx_distill.records import ComparisonRecord, Generation, Prompt, Verdict
from mlx_distill.report.fitting import fitting_losses, fitting_outcomes, present_answers
from mlx_distill.report.wording import CONTENDER_TITLES
from mlx_distill.run_records import MetricRow, RunRecord
from mlx_distill.scores import Duel, HeldOutLoss, ScoredAnswer
from mlx_distill.verdicts import first_answers, fitting_duels, fitting_verdicts


@dataclass(frozen=True)
class Rival:
    """Another run's student, set against this one.

    Attributes:
        contender: What it is called here.
        root: Folder of its own comparison.
        shared: Prompts that both comparisons asked.
        differences: How it was asked otherwise, in sentences.
    """

    contender: str
    root: Path
    shared: int
    differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stale:
    """How many results were left out because they speak of earlier answers, and none speaks of the present one.

    Attributes:
        losses: Those of a model that no longer stands for its contender.
        calibrations: 1 where the judges were held against people on other answers than these.
    """

    verdicts: int = 0
    outcomes: int = 0
    duels: int = 0
    losses: int = 0
    calibrations: int = 0


@dataclass(frozen=True)
class Evidence:
    """What is known of a comparison.

    Attributes:
        run_path: Folder of the training run; None where none was found.
        generations: One a prompt and contender, the latest.
        samples: All answers of each, the latest; they count for pass@k.
        verdicts: Those whose answer is the one shown.
        outcomes: What the tests made of the answers.
        duels: Those between two answers that are shown.
        losses: On held-out answers of the teacher.
        metrics: In the order of training, each step and evaluation once.
        calibration: How far the judges agree with people on these answers; None where nobody asked people.
        rivals: Other runs' students among the contenders.
    """

    folder: ComparisonFolder
    name: str
    record: ComparisonRecord | None
    run_path: Path | None
    run: RunRecord | None
    generations: tuple[Generation, ...]
    samples: tuple[Generation, ...]
    verdicts: tuple[Verdict, ...]
    outcomes: tuple[ScoredAnswer, ...]
    duels: tuple[Duel, ...]
    losses: tuple[HeldOutLoss, ...]
    stale: Stale
    metrics: tuple[MetricRow, ...]
    calibration: Calibration | None = None
    rivals: tuple[Rival, ...] = ()

    @property
    def manifest(self) -> Manifest | None:
        """Of the data set that the student learned from."""
        return self.run.manifest if self.run else None

    @property
    def teacher(self) -> str | None:
        """The spec of the teacher: of the comparison, else of the data set."""
        if self.record and self.record.teacher:
            return self.record.teacher
        return self.manifest.teacher if self.manifest else None

    @cached_property
    def contenders(self) -> tuple[str, ...]:
        """Who answered, in the order of display."""
        present = {g.contender for g in self.generations}
        others = tuple(dict.fromkeys(g.contender for g in self.generations if g.contender not in CONTENDER_TITLES))
        return (*(c for c in CONTENDER_TITLES if c in present), *others)

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """What was asked, in the order of asking."""
        return tuple({g.prompt.id: g.prompt for g in self.generations}.values())

    @cached_property
    def models(self) -> dict[str, str]:
        """What answered, by contender."""
        return {g.contender: g.model for g in self.generations}

    @cached_property
    def judges(self) -> tuple[str, ...]:
        """Who judged: models first, the rubric last."""
        names = dict.fromkeys(v.judge for v in self.verdicts)
        return tuple(sorted(names, key=lambda name: name == "rubric"))

    @cached_property
    def _outcomes(self) -> dict[tuple[str, str], ScoredAnswer]:
        return {(o.outcome.task_id, o.contender): o for o in self.outcomes if o.sample == 0}

    @cached_property
    def _answers(self) -> dict[tuple[str, str], Generation]:
        return {(g.prompt.id, g.contender): g for g in self.generations}

    @cached_property
    def _verdicts(self) -> dict[tuple[str, str, str], Verdict]:
        return {(v.judge, v.prompt_id, v.contender): v for v in self.verdicts}

    def answer(self, prompt_id: str, contender: str) -> Generation | None:
        """What a contender said."""
        return self._answers.get((prompt_id, contender))

    def verdict(self, judge: str, prompt_id: str, contender: str) -> Verdict | None:
        """What a judge made of it."""
        return self._verdicts.get((judge, prompt_id, contender))

    def outcome(self, prompt_id: str, contender: str) -> ScoredAnswer | None:
        """What the tests made of the answer that is shown."""
        return self._outcomes.get((prompt_id, contender))

    def of(self, contender: str) -> list[Generation]:
        """All answers of a contender."""
        return [g for g in self.generations if g.contender == contender]

    def speed(self, contender: str) -> float | None:
        """Tokens a second of a contender, None where they were not measured."""
        speeds = self.record.tokens_per_second.items() if self.record else ()
        return next((speed for name, speed in speeds if name == contender), None)


def read_evidence(root: Path) -> Evidence:
    """Read what lies in a comparison's folder, and the run it came from.

    Raises:
        InputError: There are no generations, or a file is not what it claims to be.
    """
    folder = ComparisonFolder(root)
    rows = read_rows(folder.generations, Generation)
    generations = first_answers(rows)
    name = root.resolve().name
    if not generations:
        raise InputError(
            "there are no answers to report on.",
            path=folder.generations,
            hint=f"Let the contenders answer:  mlx-distill compare adapters/{name} "
            f"--prompts data/prompts/heldout.toml --out {root}",
        )
    record = read_record(folder.record, ComparisonRecord) if folder.record.exists() else None
    run_path = _find_run(root, name, record)
    run, metrics = _read_run(run_path)
    samples = present_answers(rows, record.samples if record else None)
    verdicts, stale_verdicts = fitting_verdicts(read_rows(folder.verdicts, Verdict), generations)
    outcomes, stale_outcomes = fitting_outcomes(
        read_rows(folder.outcomes, ScoredAnswer), samples, record.tasks_sha256 if record else {}
    )
    duels, stale_duels = fitting_duels(read_rows(folder.duels, Duel), generations)
    models = {row.contender: row.model for row in generations.values()}
    losses, stale_losses = fitting_losses(read_rows(folder.held_out, HeldOutLoss), models)
    calibration = read_record(folder.calibration, Calibration) if folder.calibration.exists() else None
    stale_calibration = calibration is not None and calibration.generations_sha256 != file_sha256(folder.generations)
    return Evidence(
        folder=folder,
        name=record.name if record else name,
        record=record,
        run_path=run_path,
        run=run,
        generations=tuple(generations.values()),
        samples=tuple(samples.values()),
        verdicts=verdicts,
        outcomes=outcomes,
        duels=duels,
        losses=losses,
        stale=Stale(stale_verdicts, stale_outcomes, stale_duels, stale_losses, int(stale_calibration)),
        metrics=metrics,
        calibration=None if stale_calibration else calibration,
    )


def _find_run(root: Path, name: str, record: ComparisonRecord | None) -> Path | None:
    """The run's folder: as recorded, else from the project's root, else the one of the comparison's name."""
    project = root.resolve().parent.parent
    named = Path(record.run) if record else Path("adapters") / name
    places = [named, project / named]
    return next((place for place in places if RunFolder(place).record.exists()), None)


def _read_run(path: Path | None) -> tuple[RunRecord | None, tuple[MetricRow, ...]]:
    if path is None:
        return None, ()
    folder = RunFolder(path)
    run = read_record(folder.record, RunRecord)
    # A run that was interrupted and went on may have noted a step twice; the later note counts.
    rows = {(row.kind, row.step): row for row in read_rows(folder.metrics, MetricRow)}
    return run, tuple(sorted(rows.values(), key=lambda row: row.step))
