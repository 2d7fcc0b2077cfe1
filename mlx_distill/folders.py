"""The name of every file that the project writes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

SPLITS: tuple[Literal["train", "valid", "test"], ...] = ("train", "valid", "test")


@dataclass(frozen=True)
class DataFolder:
    """`data/NAME/`: a collection and the data set made from it."""

    root: Path

    @property
    def ledger(self) -> Path:
        return self.root / "ledger.db"

    @property
    def judge_ledger(self) -> Path:
        return self.root / "judge.db"

    @property
    def prompts(self) -> Path:
        return self.root / "prompts.jsonl"

    @property
    def manifest(self) -> Path:
        return self.root / "manifest.json"

    def split(self, name: str) -> Path:
        """The file of "train", "valid" or "test"."""
        return self.root / f"{name}.jsonl"


@dataclass(frozen=True)
class RunFolder:
    """`adapters/RUN/`: a training run and the adapter it made."""

    root: Path

    @property
    def adapter(self) -> Path:
        return self.root / "adapters.safetensors"

    @property
    def adapter_config(self) -> Path:
        return self.root / "adapter_config.json"

    @property
    def record(self) -> Path:
        return self.root / "run.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def fused(self) -> Path:
        return self.root / "fused"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    def export(self, kind: str) -> Path:
        return self.root / "export" / kind


@dataclass(frozen=True)
class BenchFolder:
    """`visuals/bench/`: how fast the backends are."""

    root: Path

    def file(self, kind: Literal["json", "md", "html", "png"]) -> Path:
        """The record, the text for an issue, the page or the chart."""
        return self.root / f"bench.{kind}"


@dataclass(frozen=True)
class ComparisonFolder:
    """`visuals/RUN/`: what the contenders said, what judges made of it, and the report."""

    root: Path

    @property
    def record(self) -> Path:
        return self.root / "comparison.json"

    @property
    def teacher_ledger(self) -> Path:
        return self.root / "teacher.db"

    @property
    def generations(self) -> Path:
        return self.root / "generations.jsonl"

    @property
    def verdicts(self) -> Path:
        return self.root / "verdicts.jsonl"

    @property
    def duels(self) -> Path:
        return self.root / "duels.jsonl"

    @property
    def judge_ledger(self) -> Path:
        return self.root / "judge.db"

    @property
    def calibration(self) -> Path:
        return self.root / "calibration.json"

    @property
    def outcomes(self) -> Path:
        return self.root / "outcomes.jsonl"

    @property
    def held_out(self) -> Path:
        return self.root / "heldout.jsonl"

    @property
    def results(self) -> Path:
        return self.root / "results.md"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def pipeline(self) -> Path:
        return self.root / "pipeline.mmd"

    def chart(self, name: str) -> Path:
        """The picture of a chart: training_curves, objective, model_scorecard, prompt_comparison, cost_scaling."""
        return self.root / f"{name}.png"


def stamp(folder: Path, step: str) -> Path:
    """Where a step of `run` notes what it was made from, inside the folder it made."""
    return folder / ".steps" / f"{step}.json"


def fused_record(folder: Path) -> Path:
    """Beside the weights of a fused model: what it was made from."""
    return folder / "mlx_distill_fused.json"


def pruned_record(folder: Path) -> Path:
    """The same, beside a model that layers were taken out of."""
    return folder / "mlx_distill_pruned.json"


def export_record(folder: Path) -> Path:
    """The same, beside an export."""
    return folder / "mlx_distill_export.json"


def logits_record(folder: Path) -> Path:
    """Beside a teacher's logits: what they were made from."""
    return folder / "logits.json"
