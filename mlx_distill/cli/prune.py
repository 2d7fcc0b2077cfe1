"""`mlx-distill prune`."""

from __future__ import annotations

import shlex

from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import PruneConfig
from mlx_distill.progress import Progress

_SOURCES = {
    "train": "rows of train.jsonl",
    "valid": "rows of valid.jsonl",
    "test": "rows of test.jsonl",
    "starter": "of the answers that ship",
}


@make_command(
    PruneConfig,
    examples="""
    mlx-distill prune smollm2-135m --keep-layers 20 --out models/smollm2-20
    mlx-distill prune Qwen/Qwen2.5-1.5B-Instruct --keep-layers 21 --out models/qwen-21 --data data/mine
    """,
    keeps="Nothing was changed; a half-made model was removed.",
)
def command(config: PruneConfig, progress: Progress) -> Summary:
    """Make a smaller student by taking layers out of a model.

    Of the layers, in each round the one goes whose removal raises the loss least, as measured on rows of --data or on
    the answers that ship. The result is a whole model in Hugging Face layout, a start to distil into: until it is
    trained it says less than the model it was made from.
    """
    from mlx_distill.prune import prune

    record = prune(config, progress)
    out = shlex.quote(str(config.out))
    data = shlex.quote(str(config.data)) if config.data is not None else "DATA"
    teacher = shlex.quote(f"mlx:{config.model}")
    return Summary(
        {"pruned": str(config.out), **record.model_dump(exclude={"format"})},
        [
            f"Kept {len(record.kept)} of the {record.layers} layers of {record.model} ({_size(record.bytes)}).",
            f"  model  {config.out}",
            f"  gone   {', '.join(str(removal.layer) for removal in record.removed)}  (in this order, from 0)",
            f"  loss   {record.removed[-1].loss:.4f} nats a token, before {record.loss:.4f} "
            f"({record.rows} {_SOURCES[record.source]}, {record.tokens:,} tokens)",
            f"  train it:  mlx-distill train --model {out} --data {data} --run adapters/NAME --layers all",
            f"  to learn its teacher's distribution, first:  mlx-distill logits --data {data} --teacher {teacher}",
            "  and train it with:  --distill forward-kl --teacher-logits FOLDER",
        ],
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"
