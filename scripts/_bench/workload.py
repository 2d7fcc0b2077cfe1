"""What every contender is given, and what each hands back: JSON files in one folder, read by processes of their own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

#: Alike for all.
BATCH_SIZE = 4
RANK = 8
SCALE = 2.0
LEARNING_RATE = 2e-4
#: Where the cosine ends, as a share of the peak. It starts at the peak: the three warm up in three different ways.
FINAL_SHARE = 0.1
WEIGHT_DECAY = 0.01


@dataclass(frozen=True)
class Workload:
    """What is trained on, how, and where the files are.

    Attributes:
        folder: Of the whole benchmark.
        rows: To train on; a multiple of the batch size, since `mlx_lm.lora` drops what does not fill a batch.
        shortest: Tokens of the shortest row, and `longest` of the longest, chat template included.
        layers: Transformer layers that get an adapter, counted from the last.
    """

    folder: Path
    rows: int
    valid_rows: int
    shortest: int
    longest: int
    epochs: int
    layers: int
    seed: int

    @property
    def max_length(self) -> int:
        """What the contenders are told; no row, padded as each of them pads, is as long, so nothing is cut."""
        return -(-(self.longest + 1) // 64) * 64 + 64

    @property
    def steps_per_epoch(self) -> int:
        return self.rows // BATCH_SIZE

    @property
    def model(self) -> Path:
        """The student in float32."""
        return self.folder / "model"

    @property
    def data(self) -> Path:
        """Holds train.jsonl alone: a contender that sees no validation rows spends no time on them."""
        return self.folder / "data"

    @property
    def valid(self) -> Path:
        return self.folder / "valid.jsonl"

    @property
    def probe(self) -> Path:
        """Holds the shortest rows, one batch of them, for trying things shortly."""
        return self.folder / "probe"

    @property
    def facts(self) -> Path:
        """What `prepare` found out: lengths, versions, the BLAS."""
        return self.folder / "facts.json"

    def save(self) -> Path:
        """Write it where the contenders' processes read it."""
        path = self.folder / "workload.json"
        path.write_text(json.dumps(asdict(self), default=str))
        return path


def load(path: str) -> Workload:
    """Read what `save` wrote."""
    values = json.loads(Path(path).read_text())
    return Workload(**{**values, "folder": Path(values["folder"])})


@dataclass(frozen=True)
class Step:
    """An optimizer step of a contender.

    Attributes:
        loss: As the contender reports it: the mean over the tokens it counts.
        targets: How many tokens it counts.
    """

    loss: float
    targets: int
    seconds: float


@dataclass(frozen=True)
class Trained:
    """What a contender did.

    Attributes:
        seconds: Of training alone.
        trainable: Parameters of the adapter.
        adapters: The adapter after each epoch, in the contender's own format.
        notes: What else it says of itself: versions, options.
    """

    steps: list[Step]
    seconds: float
    trainable: int
    adapters: list[str]
    notes: dict[str, Any]

    def epoch_losses(self, steps_per_epoch: int) -> list[float]:
        """Mean training loss over the tokens of each epoch."""
        epochs = [self.steps[at : at + steps_per_epoch] for at in range(0, len(self.steps), steps_per_epoch)]
        return [sum(s.loss * s.targets for s in epoch) / sum(s.targets for s in epoch) for epoch in epochs]

    def save(self, folder: Path) -> None:
        """Write it to a contender's folder."""
        (folder / "trained.json").write_text(json.dumps(asdict(self)))


def load_trained(folder: Path) -> Trained:
    """Read what a contender's process wrote."""
    values = json.loads((folder / "trained.json").read_text())
    return Trained(**{**values, "steps": [Step(**step) for step in values["steps"]]})
