"""A project folder with a small comparison, built from the records that the other steps write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import pytest

from mlx_distill.config import TrainConfig
from mlx_distill.layout import ComparisonFolder, RunFolder, append_row, write_text
from mlx_distill.manifest import Manifest, TeacherTerms
from mlx_distill.records import ComparisonRecord, DimensionScore, Generation, ModelRecord, Prompt, Usage, Verdict
from mlx_distill.report.analysis import analyse
from mlx_distill.report.evidence import read_evidence
from mlx_distill.report.flow import pipeline
from mlx_distill.report.page import page
from mlx_distill.report.run import drawings_of
from mlx_distill.report.tables import results
from mlx_distill.run_records import MetricRow, RunRecord, SplitSummary
from mlx_distill.scores import Duel, HeldOutLoss, Outcome, ScoredAnswer

DIMENSIONS = ("correctness", "structure", "documentation", "error_handling", "completeness")
CONTENDERS = ("teacher", "base", "distilled")
ANSWER = "The idea in a sentence.\n\n```python\ndef double(x: int) -> int:\n    return 2 * x\n```\n\nThat is **all**.\n"


@dataclass
class Project:
    """What a test may choose of a comparison; `write` puts it on disk.

    Attributes:
        answers: Text by (prompt id, contender), where it is not the usual one; None leaves the answer out.
        cut: (prompt id, contender) of answers that were cut.
        tested: How many of the prompts are tasks with hidden tests, of `families` families in turn.
        passes: By contender, whether its answer to the task of a number passes, by sample.
        samples: Answers of the local models to each prompt.
        duels: Judges that saw base and distilled side by side, and what each prefers: by prompt number, the winner
            where distilled is seen first, and where base is.
        held_out: Nats of each held-out row by contender; every row has 10 tokens more than the one before.
        apart: Nats that each contender is from the distribution of `apart_from` on these rows.
        minimised: What training minimised (`train.distill`); "off" learned from text alone.
        scores: Base score by contender; half the prompt's number modulo 4 is added.
    """

    root: Path
    prompts: int = 2
    contenders: tuple[str, ...] = CONTENDERS
    judges: tuple[str, ...] = ("rubric",)
    teacher: str = "recorded:data/starter"
    answers: dict[tuple[str, str], str | None] = field(default_factory=dict)
    cut: set[tuple[str, str]] = field(default_factory=set)
    scores: dict[str, float] = field(default_factory=lambda: {"base": 3.0, "distilled": 5.0, "teacher": 8.0})
    tested: int = 0
    families: int = 6
    passes: dict[str, Callable[[int, int], bool]] = field(
        default_factory=lambda: {
            "base": lambda number, _sample: number % 3 == 0,
            "distilled": lambda number, _sample: number % 3 != 1,
            "teacher": lambda number, _sample: True,
        }
    )
    samples: int = 1
    duels: dict[str, Callable[[int], tuple[str | None, str | None]]] = field(default_factory=dict)
    held_out: dict[str, list[float]] = field(default_factory=dict)
    apart: dict[str, list[float]] = field(default_factory=dict)
    apart_from: str = "big@0123456789ab"
    minimised: str = "off"
    usage: Usage = field(default_factory=Usage)
    cost_usd: float = 0.0
    splits: tuple[str, ...] = ("train", "valid", "test")
    with_manifest: bool = True
    with_run: bool = True
    with_metrics: bool = True
    with_record: bool = True
    model_name: str = "SmolLM2-135M-Instruct"

    @property
    def folder(self) -> ComparisonFolder:
        return ComparisonFolder(self.root / "visuals" / "demo")

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.root / "adapters" / "demo")

    def generations(self) -> list[Generation]:
        rows = []
        for number in range(self.prompts):
            prompt = Prompt(id=f"task-{number}", family=f"task-{number}", text=f"Write `double`, number {number}.")
            for contender, sample in product(self.contenders, range(self.samples)):
                text = self.answers.get((prompt.id, contender), ANSWER)
                if text is None or (sample and contender == "teacher"):
                    continue
                cut = (prompt.id, contender) in self.cut
                rows.append(
                    Generation(
                        prompt=prompt,
                        contender=contender,
                        sample=sample,
                        model=f"{contender}-model",
                        text=text,
                        stop="length" if cut else "end",
                        output_tokens=64 if cut else 40,
                        seconds=1.5,
                        max_tokens=64,
                    )
                )
        return rows

    def verdicts(self) -> list[Verdict]:
        rows = []
        for judge in self.judges:
            for generation in self.generations():
                if generation.sample:
                    continue
                value = self.scores.get(generation.contender, 4.0) + 0.5 * (
                    int(generation.prompt.id.removeprefix("task-")) % 4
                )
                scores = {
                    d: DimensionScore(score=value + 0.1 * i, rationale=f"Why {d} is so.")
                    for i, d in enumerate(DIMENSIONS)
                }
                rows.append(
                    Verdict(
                        prompt_id=generation.prompt.id,
                        contender=generation.contender,
                        judge=judge,
                        answer_sha256=generation.answer_sha256,
                        scores=scores,
                    )
                )
        return rows

    def outcomes(self) -> list[ScoredAnswer]:
        rows = []
        for generation in self.generations():
            number = int(generation.prompt.id.removeprefix("task-"))
            if number >= self.tested:
                continue
            passed = self.passes.get(generation.contender, self.passes["base"])(number, generation.sample)
            rows.append(
                ScoredAnswer(
                    contender=generation.contender,
                    sample=generation.sample,
                    answer_sha256=generation.answer_sha256,
                    task_sha256=f"{number:064d}",
                    family=f"family-{number % self.families}",
                    difficulty="easy" if number % 4 < 2 else "medium",
                    objective=True,
                    outcome=Outcome(
                        task_id=generation.prompt.id,
                        outcome="passed" if passed else "timeout" if number % 5 == 0 else "failed",
                        detail="All tests passed." if passed else f"assert double({number}) == {2 * number}",
                        parses=True,
                        tests=4,
                        tests_passed=4 if passed else 1,
                        isolation="process",
                    ),
                )
            )
        return rows

    def duel_rows(self) -> list[Duel]:
        shown = {(g.prompt.id, g.contender): g.answer_sha256 for g in self.generations() if g.sample == 0}
        rows = []
        for judge, says in self.duels.items():
            for number in range(self.prompts):
                prompt = f"task-{number}"
                for (first, second), winner in zip(
                    (("distilled", "base"), ("base", "distilled")), says(number), strict=True
                ):
                    hashes = {"first_sha256": shown[prompt, first], "second_sha256": shown[prompt, second]}
                    problem = "not JSON" if winner is None else None
                    rows.append(
                        Duel(prompt_id=prompt, judge=judge, first=first, second=second, winner=winner,
                             problem=problem, **hashes)
                    )  # fmt: skip
        return rows

    def losses(self) -> list[HeldOutLoss]:
        def row(contender: str, n: int, nll: float) -> HeldOutLoss:
            loss = HeldOutLoss(
                row_sha256=f"{n:064d}", contender=contender, model=f"{contender}-model", nll=nll, tokens=10 * (n + 1)
            )
            if contender not in self.apart:
                return loss
            measured = {"divergence": self.apart[contender][n], "teacher": self.apart_from, "top_k": 64}
            return loss.model_copy(update=measured)

        return [row(c, n, nll) for c, values in self.held_out.items() for n, nll in enumerate(values)]

    def metrics(self) -> list[MetricRow]:
        def row(kind: str, step: int, epoch: float, loss: float, accuracy: float, tokens: int = 100) -> MetricRow:
            return MetricRow(
                kind=kind,
                step=step,
                epoch=epoch,
                loss=loss,
                token_accuracy=accuracy,
                target_tokens=tokens,
                tokens=120,
                seconds=2.0 * step,
                learning_rate=1e-4 if kind == "step" else None,
                divergence=None if self.minimised == "off" else round(loss - 1, 6),
            )

        rows = [row("step", s, s / 4, 1.5 - 0.05 * s, 0.6 + 0.01 * s, 100 + 10 * s) for s in range(1, 9)]
        if "valid" in self.splits:
            rows += [row("valid", 0, 0, 1.6, 0.58), row("valid", 4, 1, 1.4, 0.62), row("valid", 8, 2, 1.3, 0.64)]
        if "test" in self.splits:
            rows.append(row("test", 8, 2, 1.35, 0.63))
        return rows

    def manifest(self) -> Manifest:
        return Manifest(
            name="demo",
            created="2026-11-20T10:00:00Z",
            teacher=self.teacher,
            terms=TeacherTerms(teacher=self.teacher, licence="MIT", summary="Written for this project."),
            prompts=104,
            answered=100,
            rows={"train": 80, "valid": 10, "test": 10},
            families={"train": 26, "valid": 3, "test": 3},
            sha256={},
            usage=self.usage,
            cost_usd=self.cost_usd,
            prices_dated="2026-11-01",
            collection_seconds=30.0,
        )

    def run_record(self) -> RunRecord:
        sizes = {"train": 80, "valid": 10, "test": 10}
        taught = {"distill": self.minimised, "teacher_online": "mlx:big"} if self.minimised != "off" else {}
        settings = {"data": "data/demo", "model": "smollm2-135m", "run": "adapters/demo", "epochs": 2, **taught}
        config = TrainConfig.model_validate(settings)
        return RunRecord(
            identity="0" * 64,
            status="finished",
            created="2026-11-20T10:05:00Z",
            version="0.1.0",
            backend="mlx",
            device="cpu",
            model=ModelRecord(spec="smollm2-135m", source="bundled", path="model", name=self.model_name),
            config=config.model_dump(mode="json"),
            splits={
                name: SplitSummary(
                    rows=sizes[name], tokens=500 * sizes[name], target_tokens=400 * sizes[name], sha256="0"
                )
                for name in self.splits
            },
            trainable_parameters=460_800,
            manifest=self.manifest() if self.with_manifest else None,
            epochs=2,
            steps=8,
            best_step=8,
            first_valid_loss=1.6,
            valid_loss=1.3,
            distilled_from="big" if taught else None,
            first_divergence=0.6 if taught else None,
            divergence=0.3 if taught else None,
            tokens_per_second=83.2,
            seconds=312.0,
        )

    def write(self) -> Path:
        folder = self.folder
        folder.root.mkdir(parents=True, exist_ok=True)
        for generation in self.generations():
            append_row(folder.generations, generation)
        for verdict in self.verdicts():
            append_row(folder.verdicts, verdict)
        for path, rows in (
            (folder.outcomes, self.outcomes()), (folder.duels, self.duel_rows()), (folder.held_out, self.losses())
        ):  # fmt: skip
            for row in rows:
                append_row(path, row)
        if self.with_record:
            record = ComparisonRecord(
                name="demo",
                run=str(self.run.root),
                created="2026-11-20T10:12:00Z",
                teacher=self.teacher if "teacher" in self.contenders else None,
                models={c: f"{c}-model" for c in self.contenders},
                prompts="data/prompts/heldout.toml",
                prompts_sha256="0" * 64,
                evals=("builtin",) if self.tested else (),
                tasks_sha256={f"task-{n}": f"{n:064d}" for n in range(self.tested)},
                samples=self.samples,
                temperature=0.8 if self.samples > 1 else 0.0,
                max_tokens=64,
                device="cpu",
                tokens_per_second={"base": 41.5},
            )
            write_text(folder.record, record.to_json())
        if self.with_run:
            write_text(self.run.record, self.run_record().to_json())
            if self.with_metrics:
                for row in self.metrics():
                    append_row(self.run.metrics, row)
        return folder.root


@pytest.fixture
def project(tmp_path: Path) -> Callable[..., Project]:
    """Make a project with the given choices."""

    def make(**choices: object) -> Project:
        return Project(tmp_path, **choices)  # type: ignore[arg-type]

    return make


@dataclass(frozen=True)
class Texts:
    """What a report says, without its pictures, which take longest."""

    page: str
    results: str
    flow: str
    missing: tuple[str, ...]
    charts: set[str]


@pytest.fixture
def read() -> Callable[[Project], Texts]:
    """Write a project and say what its report says."""

    def texts(made: Project) -> Texts:
        analysis = analyse(read_evidence(made.write()))
        return Texts(
            page(analysis),
            results(analysis),
            pipeline(analysis),
            tuple(note.text for note in analysis.missing),
            set(drawings_of(analysis)),
        )

    return texts
