"""`mlx-distill train`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from mlx_distill import layout
from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import TrainConfig
from mlx_distill.errors import InputError, MlxDistillError
from mlx_distill.progress import SILENT, Progress
from mlx_distill.run_records import RunRecord


def kept(config: TrainConfig) -> str:
    """What an interrupted training leaves."""
    folder = layout.RunFolder(config.run)
    with suppress(InputError):
        if layout.read_record(folder.record, RunRecord).status == "finished":
            return f"The run in {folder.root} is finished, and whole."
    # A file still being written has a name that begins with a dot.
    if any(not path.name.startswith(".") for path in folder.checkpoints.glob("*")):
        return "The last checkpoint stands; the same command goes on from it."
    return "No checkpoint had been saved yet; the same command goes on from the start."


@make_command(
    TrainConfig,
    examples="""
    mlx-distill train --data data/mine --run adapters/mine
    mlx-distill train --data data/mine --model smollm2-135m --run adapters/small --layers 8 --epochs 2
    mlx-distill train --data data/mine --run adapters/mine --micro-batch-size 1     (less memory, same update)
    mlx-distill train --data data/mine --run adapters/mine --epochs 20 --validate-every 50 --patience 4
    mlx-distill train --data data/mine --run adapters/mine --finish     (of an interrupted run, what it has so far)
    mlx-distill train --data data/mine --run adapters/kl --distill forward-kl --teacher-logits data/mine/logits/NAME-64
    mlx-distill train --data data/mine --run adapters/own --distill jsd --teacher-online mlx:MODEL --on-policy 0.5
    """,
    keeps=kept,
)
def command(config: TrainConfig, progress: Progress) -> Summary:
    """Train a LoRA adapter on a data set.

    --data takes any folder in mlx-lm's layout: train.jsonl and, if there, valid.jsonl and test.jsonl, with rows of
    {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}. The adapter, LoRA or DoRA, is in mlx-lm's
    format.

    --distill learns a teacher's distribution instead of its text alone. Train a run on the text beside it, and compare.

    Under mlx.launch several machines train together, each on its share of every batch; see the README.
    """
    from mlx_distill.training.launch import joined
    from mlx_distill.training.run import train

    first = True
    try:
        with joined() as peers:
            first = peers.rank == 0
            record = train(config, progress if first else SILENT, peers)
            return summarise(config, record) if first else Summary({}, silent=True)
    except (MlxDistillError, KeyboardInterrupt):
        if first:
            raise
        # Rank 0 has been told, and says it.
        return Summary({}, failed=True, silent=True)


def summarise(config: TrainConfig, record: RunRecord) -> Summary:
    """What `train` prints."""
    adapter = layout.RunFolder(config.run).adapter
    data: dict[str, Any] = {
        key: getattr(record, key)
        for key in (
            "epochs",
            "steps",
            "stopped_early",
            "cut_short",
            "best_step",
            "first_valid_loss",
            "train_loss",
            "valid_loss",
            "test_loss",
            "token_accuracy",
            "distilled_from",
            "first_divergence",
            "divergence",
            "tokens_per_second",
            "peak_memory_bytes",
            "seconds",
            "trainable_parameters",
        )
    }
    data["adapter"] = str(adapter)
    lines = [
        f"Trained {record.trainable_parameters / 1e6:.1f}M parameters of {record.model.name}, "
        f"{record.epochs} epoch{'s' * (record.epochs != 1)}."
    ]
    if record.valid_loss is not None and record.first_valid_loss is not None:
        lines.append(
            f"  validation loss  {record.first_valid_loss:.4f} → {record.valid_loss:.4f}"
            + (f"  (best at step {record.best_step} of {record.steps})" if record.distilled_from is None else "")
        )
    elif record.train_loss is not None:
        lines.append(f"  train loss       {record.train_loss:.4f}")
    if record.distilled_from is not None:
        lines += _distilled(config, record)
    if record.stopped_early:
        lines.append(f"  stopped early    after {record.steps} steps: {_minimised(config)} no longer fell")
    if record.cut_short:
        lines.append(f"  cut short        after {record.steps} steps, by --finish")
    if record.token_accuracy is not None:
        lines.append(f"  token accuracy   {record.token_accuracy:.1%}")
    if record.test_loss is not None:
        lines.append(f"  test loss        {record.test_loss:.4f}")
    if record.seconds and record.tokens_per_second and record.peak_memory_bytes:
        lines.append(
            f"  {record.seconds:.0f} s, {record.tokens_per_second:,.0f} real tokens/s, "
            f"{record.peak_memory_bytes / 1e9:.1f} GB at most, on {record.device}"
        )
    lines.append(f"  adapter          {adapter}")
    return Summary(data, lines)


def _distilled(config: TrainConfig, record: RunRecord) -> Iterator[str]:
    """How near it came to the teacher, and by what its best adapter was told."""
    if record.divergence is None or record.first_divergence is None:
        # Nothing to validate on.
        yield f"  distilled from   {record.distilled_from}"
        return
    yield (
        f"  divergence       {record.first_divergence:.4f} → {record.divergence:.4f}"
        f"  from {record.distilled_from}, by {config.distill}"
    )
    yield f"  best at step     {record.best_step} of {record.steps}, where {_minimised(config)} was least"


def _minimised(config: TrainConfig) -> str:
    """What the best adapter has the least of."""
    if config.distill == "off":
        return "the validation loss"
    if config.distill_weight == 1:
        return "the divergence on the validation rows"
    rest = 1 - config.distill_weight
    return f"{config.distill_weight:g} × divergence + {rest:g} × loss on the validation rows"
