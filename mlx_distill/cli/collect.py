"""`mlx-distill collect`."""

from __future__ import annotations

from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import CollectConfig
from mlx_distill.progress import Progress
from mlx_distill.records import DropCount, Manifest

_IDS_SHOWN = 5


@make_command(
    CollectConfig,
    examples="""
    mlx-distill collect --prompts data/prompts/coding.toml --teacher recorded:data/starter --out data/starter-set
    mlx-distill collect --prompts my-prompts.txt --teacher anthropic:claude-sonnet-4-6 --out data/mine --accept-terms
    """,
    keeps="Every answer received is in the ledger; the same command goes on from there.",
)
def command(config: CollectConfig, progress: Progress) -> Summary:
    """Ask a teacher every prompt and make a data set of its answers."""
    from mlx_distill.collect.run import collect_from_spec

    return summarise(collect_from_spec(config, progress), config)


def summarise(manifest: Manifest, config: CollectConfig) -> Summary:
    """What a collection came to; failed where prompts are without a reply."""
    failed = next((drop.count for drop in manifest.dropped if drop.reason == "failed"), 0)
    lines = [
        f"{manifest.answered} of {manifest.prompts} prompts answered by {manifest.teacher}.",
        f"{config.out}: {_splits(manifest)}.",
    ]
    lines += [f"Left out, {drop.reason}: {drop.count} ({_ids(drop)})." for drop in manifest.dropped]
    lines += [
        f"No prompt family falls into {split}; the split goes by a hash of the family, so more prompts will fill it."
        for split, fraction in (("valid", config.valid_fraction), ("test", config.test_fraction))
        if fraction and not manifest.rows[split]
    ]
    usage = manifest.usage
    if usage.output_tokens:
        cost = f"${manifest.cost_usd:.2f} at the prices of {manifest.prices_dated}"
        lines.append(
            f"{usage.input_tokens:,} tokens in, {usage.output_tokens:,} out: "
            f"{cost if manifest.prices_dated else 'cost not known, this model has no listed price'}."
        )
    if failed:
        lines.append(
            f"{failed} {'prompt' if failed == 1 else 'prompts'} failed. The same command asks again, only what failed."
        )
    else:
        lines.append(f"Next:  mlx-distill train --data {config.out} --run adapters/{manifest.name}")
    data = {"out": str(config.out), "failed": failed, **manifest.model_dump(mode="json")}
    return Summary(data, lines, failed=failed > 0)


def _splits(manifest: Manifest) -> str:
    return ", ".join(
        f"{split} {rows} rows ({manifest.families[split]} families)" for split, rows in manifest.rows.items()
    )


def _ids(drop: DropCount) -> str:
    shown = ", ".join(drop.prompt_ids[:_IDS_SHOWN])
    return shown if drop.count <= _IDS_SHOWN else f"{shown} and {drop.count - _IDS_SHOWN} more"
