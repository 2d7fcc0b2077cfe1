"""A process of its own: `mlx_lm.lora` as it is, on the BLAS that ours has, with a callback that notes each step.

    python -m _bench.mlx_lm_lora WORKLOAD.json FOLDER [--data FOLDER] [--iterations N] [--allocator]

Its own clock is used: `train_time` of `mlx_lm.tuner.trainer.train`, from a batch at hand to the evaluated update, so
that making the batches, saving and starting up are not in it. Whether `mx.compile` compiles is left to the variable
`MLX_DISABLE_COMPILE`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from _bench import workload
from _bench.peer import load_blas
from _bench.workload import BATCH_SIZE, FINAL_SHARE, LEARNING_RATE, RANK, SCALE, WEIGHT_DECAY, Step, Trained, Workload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workload")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--iterations", type=int)
    parser.add_argument("--allocator", action="store_true")
    arguments = parser.parse_args()
    work = workload.load(arguments.workload)
    iterations = arguments.iterations or work.epochs * work.steps_per_epoch
    config = arguments.folder / "config.yaml"
    config.write_text(yaml.safe_dump(_settings(work, arguments.data or work.data, arguments.folder, iterations)))

    notes = {
        "blas": load_blas(allocator=arguments.allocator),
        "allocator": arguments.allocator,
        "compiled": "MLX_DISABLE_COMPILE" not in os.environ,
    }
    # Only now: MLX binds to the BLAS that is there when it is imported.
    from mlx_lm import lora

    recorder = _Recorder()
    # `lora.run` replaces the callback that it is given by what this returns.
    lora.get_reporting_callbacks = lambda *_, **__: recorder
    sys.argv = ["mlx_lm.lora", "--config", str(config)]
    lora.main()
    adapters = [str(arguments.folder / f"{(at + 1) * work.steps_per_epoch:07d}_adapters.safetensors")
                for at in range(work.epochs)]  # fmt: skip
    Trained(
        steps=recorder.steps,
        seconds=sum(step.seconds for step in recorder.steps),
        trainable=_parameters(arguments.folder / "adapters.safetensors"),
        adapters=[path for path in adapters if Path(path).exists()],
        notes=notes,
    ).save(arguments.folder)


def _settings(work: Workload, data: Path, folder: Path, iterations: int) -> dict[str, Any]:
    return {
        "model": str(work.model),
        "train": True,
        "data": str(data),
        "adapter_path": str(folder),
        "fine_tune_type": "lora",
        "num_layers": work.layers,
        "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0},
        "mask_prompt": True,
        "batch_size": BATCH_SIZE,
        "iters": iterations,
        "max_seq_length": work.max_length,
        "optimizer": "adamw",
        "optimizer_config": {"adamw": {"weight_decay": WEIGHT_DECAY, "bias_correction": True}},
        "lr_schedule": {
            "name": "cosine_decay",
            "arguments": [LEARNING_RATE, work.epochs * work.steps_per_epoch, FINAL_SHARE * LEARNING_RATE],
        },
        "steps_per_report": 1,
        "save_every": work.steps_per_epoch,
        "seed": work.seed,
    }


class _Recorder:
    """A `TrainingCallback` of mlx-lm that is called after every step."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self._targets = 0

    def on_train_loss_report(self, report: dict[str, Any]) -> None:
        targets = int(report["trained_tokens"]) - self._targets
        self._targets += targets
        self.steps.append(Step(report["train_loss"], targets, 1 / report["iterations_per_second"]))

    def on_val_loss_report(self, report: dict[str, Any]) -> None:
        raise AssertionError("there are no validation rows")


def _parameters(adapter: Path) -> int:
    import mlx.core as mx

    weights = mx.load(str(adapter))
    assert isinstance(weights, dict)
    return sum(value.size for value in weights.values())


if __name__ == "__main__":
    main()
