"""The trainers that people use now, as rows of a bench: `mlx_lm.lora` and TRL's `SFTTrainer`, each as it is.

They make their own batches and their own start, so their losses are not compared. Their time is that of their steps, by
their own clocks: loading, batching and saving are not in it, which ours has in its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_distill.backends.memory import resident_peak_bytes
from mlx_distill.bench.records import Epoch, Task, Timing
from mlx_distill.config import TrainConfig
from mlx_distill.dataset import load_splits
from mlx_distill.errors import DependencyError
from mlx_distill.models.resolve import resolve
from mlx_distill.models.tokenizer import load_tokenizer

#: What is imported for each row.
PEERS = {"mlx_lm.lora": "mlx_lm", "trl": "trl"}


def measure_peer(task: Task, started: float) -> Timing:
    """Let a peer train; see `worker.measure`."""
    assert task.peer is not None
    if importlib.util.find_spec(PEERS[task.peer]) is None:
        raise DependencyError(PEERS[task.peer], extra="peers")
    config = TrainConfig.model_validate(task.config)
    model = Path(resolve(config.model).path)
    lengths = load_splits(config.data, load_tokenizer(model), max_length=config.max_length)["train"].lengths
    train: Callable[..., Any] = _mlx_lm if task.peer == "mlx_lm.lora" else _trl
    with tempfile.TemporaryDirectory() as folder:
        seconds, losses, device, trainable, first = train(config, model, Path(folder), lengths)
    steps = -(-len(lengths) // config.batch_size)
    parts = [seconds[at : at + steps] for at in range(0, len(seconds), steps)]
    return Timing(
        backend=task.peer,
        device=device,
        ways="as it is",
        trainable=trainable,
        first_step_seconds=first - started,
        epochs=[Epoch(seconds=sum(part), tokens=int(lengths.sum()), step_seconds=part) for part in parts],
        losses=losses,
        peak_bytes=resident_peak_bytes(),
        device_bytes=resident_peak_bytes(),
    )


def _mlx_lm(config: TrainConfig, model: Path, folder: Path, lengths: NDArray[np.int32]) -> tuple[Any, ...]:
    # Ours turns it off for itself, on a CPU; a peer runs as it would alone.
    os.environ.pop("MLX_DISABLE_COMPILE", None)
    import mlx.core as mx
    import yaml
    from mlx_lm import lora

    mx.enable_compile()
    seconds: list[float] = []
    losses: list[float] = []
    ends: list[float] = []

    class Recorder:
        def on_train_loss_report(self, report: dict[str, Any]) -> None:
            seconds.append(1 / report["iterations_per_second"])
            losses.append(report["train_loss"])
            ends.append(time.time())

        def on_val_loss_report(self, report: dict[str, Any]) -> None:
            pass

    # `lora.run` replaces the callback that it is given by what this returns.
    lora.get_reporting_callbacks = lambda *_, **__: Recorder()
    settings = {
        "model": str(model),
        "train": True,
        "data": str(config.data),
        "adapter_path": str(folder),
        "num_layers": -1 if config.layers == "all" else config.layers,
        "lora_parameters": {"rank": config.rank, "scale": config.scale, "dropout": 0.0},
        "mask_prompt": True,
        "batch_size": config.batch_size,
        "iters": config.epochs * (len(lengths) // config.batch_size),
        "max_seq_length": int(lengths.max()) + 64,
        "optimizer": "adamw",
        "steps_per_report": 1,
        "save_every": 10**9,
        "seed": config.seed,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    sys.argv = ["mlx_lm.lora", "--config", str(folder / "config.yaml")]
    lora.main()
    weights = mx.load(str(folder / "adapters.safetensors"))
    assert isinstance(weights, dict)
    trainable = sum(value.size for value in weights.values())
    return seconds, losses, f"{mx.default_device()}, the model's own type", trainable, ends[0]


def _trl(config: TrainConfig, model: Path, folder: Path, lengths: NDArray[np.int32]) -> tuple[Any, ...]:
    import datasets
    import peft
    import transformers
    import trl

    seconds: list[float] = []
    losses: list[float] = []
    ends: list[float] = []

    class Recorder(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.begun)
            ends.append(time.time())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" in logs:
                losses.append(float(logs["loss"]))

    total = json.loads((model / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]
    first = 0 if config.layers == "all" else total - config.layers
    lines = (config.data / "train.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    trainer = trl.SFTTrainer(
        model=str(model),
        args=trl.SFTConfig(
            output_dir=str(folder),
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            optim="adamw_torch",
            max_length=int(lengths.max()) + 64,
            # Its default computes twice.
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            dataloader_pin_memory=False,
            report_to=[],
            disable_tqdm=True,
            seed=config.seed,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": c[:-1], "completion": c[-1:]} for c in chats]),
        peft_config=peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=config.rank,
            lora_alpha=int(config.scale * config.rank),
            lora_dropout=0.0,
            target_modules="all-linear",
            layers_to_transform=list(range(first, total)),
            layers_pattern="layers",
        ),
        callbacks=[Recorder()],
    )
    trainer.train()
    trainable = sum(int(np.prod(p.shape)) for p in trainer.model.parameters() if p.requires_grad)
    return seconds, losses, f"{trainer.args.device}, {trainer.model.dtype}", trainable, ends[0]
