"""`mlx-distill logits`."""

from __future__ import annotations

import shlex

from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import LogitsConfig
from mlx_distill.progress import Progress


@make_command(
    LogitsConfig,
    examples="""
    mlx-distill logits --data data/mine --teacher mlx:Qwen/Qwen2.5-7B-Instruct
    mlx-distill logits --data data/mine --teacher mlx:smollm2-135m --top-k 32 --out data/mine/logits/small
    """,
    keeps="Every finished row was kept; the same command goes on from there.",
)
def command(config: LogitsConfig, progress: Progress) -> Summary:
    """Write a local teacher's distribution over a data set, for a student to learn with  train --distill.

    Teacher and student must have the same tokenizer; train refuses others. For those, learn from the text:
    mlx-distill collect --teacher mlx:MODEL. The two are never in memory together.
    """
    from mlx_distill.logits import logits_folder, write_logits

    record = write_logits(config, progress)
    folder = logits_folder(config)
    positions = sum(split.positions for split in record.splits.values())
    lines = [
        f"{'':<6} {'rows':>8} {'positions':>10}",
        *(f"{name:<6} {split.rows:>8,} {split.positions:>10,}" for name, split in record.splits.items()),
        f"  {record.top_k} tokens of {record.words:,} at each, {record.entry_bytes} bytes: "
        f"{positions * record.entry_bytes / 1e6:,.1f} MB in {folder}",
        f"  next:  mlx-distill train --data {shlex.quote(str(config.data))} --model STUDENT --run adapters/NAME "
        f"--distill forward-kl --teacher-logits {shlex.quote(str(folder))}",
    ]
    data = {"folder": str(folder), "bytes": positions * record.entry_bytes, **record.model_dump(exclude={"format"})}
    return Summary(data, lines)
