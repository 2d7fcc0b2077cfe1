"""`mlx-distill compare`."""

from __future__ import annotations

from mlx_distill import layout
from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import CompareConfig
from mlx_distill.progress import Progress
from mlx_distill.records import Generation


@make_command(
    CompareConfig,
    examples="""
    mlx-distill compare adapters/mine --prompts data/prompts/heldout.toml
    mlx-distill compare adapters/demo --prompts data/prompts/heldout.toml --teacher recorded:data/starter
    """,
    keeps="Every finished answer was kept; the same command goes on from there.",
)
def command(config: CompareConfig, progress: Progress) -> Summary:
    """Let teacher, base and distilled student answer held-out prompts, all under one token budget."""
    from mlx_distill.compare import compare, comparison_folder

    record = compare(config, progress)
    folder = comparison_folder(config)
    rows = layout.read_rows(layout.ComparisonFolder(folder).generations, Generation)
    lines = [f"{'':<10} {'answers':>7} {'cut':>4} {'tokens':>7} {'seconds':>8} {'tokens/s':>9}"]
    cut: dict[str, int] = {}
    for contender in record.models:
        own = [row for row in rows if row.contender == contender]
        cut[contender] = sum(row.stop == "length" for row in own)
        speed = record.tokens_per_second.get(contender)
        lines.append(
            f"{contender:<10} {len(own):>7} {cut[contender]:>4} {sum(r.output_tokens for r in own):>7} "
            f"{record.seconds[contender]:>8.1f} {f'{speed:.1f}' if speed else '—':>9}"
        )
    lines.append(f"  answers  {layout.ComparisonFolder(folder).generations}")
    lines.append(f"  next:    mlx-distill judge {folder}")
    return Summary({"comparison": str(folder), "cut": cut, **record.model_dump(exclude={"format"})}, lines)
