"""`mlx-distill import-adapter`."""

from __future__ import annotations

from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import ImportAdapterConfig
from mlx_distill.progress import Progress


@make_command(
    ImportAdapterConfig,
    examples="""
    mlx-distill import-adapter downloads/lora --run adapters/theirs
    mlx-distill import-adapter downloads/lora --run adapters/theirs --model Qwen/Qwen2.5-0.5B-Instruct
    """,
    keeps="Nothing was changed; a half-made run was removed.",
)
def command(config: ImportAdapterConfig, progress: Progress) -> Summary:
    """Make a run of an adapter that PEFT wrote.

    The run can be fused, compared, exported and talked with like one that was trained here. LoRA, rsLoRA and DoRA are
    taken as they are, to the bit; what mlx-lm does not compute is refused.
    """
    from mlx_distill.export.import_adapter import import_adapter

    record = import_adapter(config, progress)
    kind = f"{record.kind} of rank {record.rank}, scale {record.scale:g}"
    made = f"Imported {config.source}: {kind}, on {record.matrices} matrices in the last {record.layers} layers."
    filled = (
        [
            f"  note    {record.filled} matrices of these layers had no adapter, and have one of zero now, which "
            "changes nothing."
        ]
        if record.filled
        else []
    )
    return Summary(
        record.model_dump(),
        [
            f"{record.run} holds this adapter already." if record.earlier else made,
            f"  base    {record.model.spec}",
            f"  run     {record.run}",
            *filled,
            f"  try it:  mlx_lm.generate --model {record.model.path} --adapter-path {record.run} "
            "--prompt 'Write a binary search in Python.'",
        ],
    )
