"""`mlx-distill collect`."""

from __future__ import annotations

from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import CollectConfig
from mlx_distill.progress import Progress


@make_command(
    CollectConfig,
    examples="""
    mlx-distill collect --prompts data/prompts/coding.toml --teacher recorded:data/starter --out data/starter-set
    """,
    keeps="Every answer received is in the ledger; the same command goes on from there.",
)
def command(config: CollectConfig, progress: Progress) -> Summary:
    """Ask a teacher every prompt and make a data set of its answers."""
    raise SystemExit("filled in by collect")
