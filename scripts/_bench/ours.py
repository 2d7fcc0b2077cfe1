"""`mlx-distill train` as a contender: its settings, and what its run folder says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _bench.workload import BATCH_SIZE, FINAL_SHARE, LEARNING_RATE, RANK, SCALE, WEIGHT_DECAY, Step, Trained, Workload

if TYPE_CHECKING:
    from mlx_distill.config import TrainConfig

#: A gradient norm that none reaches: the others do not clip.
_NO_CLIPPING = 1e9


def settings(work: Workload, run: Path) -> dict[str, Any]:
    """Of `mlx_distill.config.TrainConfig`, and so, with dashes, the flags of the command."""
    return {
        "data": str(work.data),
        "model": str(work.model),
        "run": str(run),
        "epochs": work.epochs,
        "batch_size": BATCH_SIZE,
        "rank": RANK,
        "scale": SCALE,
        "layers": work.layers,
        "optimizer": "adamw",
        "learning_rate": LEARNING_RATE,
        "schedule": "cosine",
        "warmup": 0,
        "final_learning_rate": FINAL_SHARE,
        "weight_decay": WEIGHT_DECAY,
        "grad_clip": _NO_CLIPPING,
        "max_length": work.max_length,
        "seed": work.seed,
        "dtype": "float32",
        # At each epoch's end alone, and all are kept, for the adapters in them.
        "checkpoint_every": work.epochs * work.steps_per_epoch + 1,
        "keep_checkpoints": work.epochs + 1,
    }


def train_config(work: Workload, run: Path) -> TrainConfig:
    """The same as the package's own record."""
    from mlx_distill.config import TrainConfig

    return TrainConfig.model_validate(settings(work, run))


def flags(work: Workload, run: Path) -> list[str]:
    """The same as flags of `mlx-distill train`."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings(work, run).items()]


def read_run(work: Workload, run: Path) -> Trained:
    """What a finished run says of itself.

    The time is that of the loop up to the end of the last step, everything in it: steps, metrics and checkpoints.
    There are no validation rows, so no evaluation is in it.
    """
    record = json.loads((run / "run.json").read_text())
    steps, before, end = [], 0.0, 0.0
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["kind"] == "step":
            end = row["seconds"]
            steps.append(Step(row["loss"], row["target_tokens"], end - before))
        before = row["seconds"]
    return Trained(
        steps=steps,
        seconds=end,
        trainable=record["trainable_parameters"],
        adapters=[
            str(run / "checkpoints" / f"step-{(at + 1) * work.steps_per_epoch:08d}.safetensors")
            for at in range(work.epochs)
        ],
        notes={key: value for key, value in record.items() if key not in ("config", "splits", "model", "manifest")},
    )
