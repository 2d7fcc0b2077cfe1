"""`mlx-distill fuse`."""

from __future__ import annotations

from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import FuseConfig
from mlx_distill.progress import Progress


@make_command(
    FuseConfig,
    examples="""
    mlx-distill fuse adapters/mine
    mlx-distill fuse adapters/mine --out models/mine
    """,
    keeps="Nothing was changed; a half-made model was removed.",
)
def command(config: FuseConfig, progress: Progress) -> Summary:
    """Merge an adapter into its base model.

    The result is a whole model in Hugging Face layout, which mlx-lm and transformers load.
    """
    from mlx_distill.fuse import fuse, fused_folder

    record = fuse(config, progress)
    out = fused_folder(config)
    return Summary(
        {"fused": str(out), **record.model_dump(exclude={"format", "run"})},
        [
            f"Fused {record.layers} layers of {record.base} ({record.bytes / 1e9:.2f} GB).",
            f"  model  {out}",
            f"  try it:  mlx_lm.generate --model {out} --prompt 'Write a binary search in Python.'",
        ],
    )
