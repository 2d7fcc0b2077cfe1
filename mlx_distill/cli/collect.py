"""`mlx-distill collect`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace

import click

from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import CollectConfig
from mlx_distill.manifest import DropCount, Manifest
from mlx_distill.progress import Progress

_IDS_SHOWN = 5


@make_command(
    CollectConfig,
    examples="""
    mlx-distill collect --prompts data/prompts/coding.toml --teacher recorded:data/starter --out data/starter-set
    mlx-distill collect --prompts my-prompts.txt --teacher anthropic:claude-sonnet-4-6 --dry-run
    mlx-distill collect --prompts my-prompts.txt --teacher anthropic:claude-sonnet-4-6 --accept-terms --max-cost 5
    mlx-distill collect --prompts my-prompts.txt --teacher anthropic:claude-sonnet-4-6 --accept-terms --batch --no-wait
    mlx-distill collect --prompts my-tasks.toml --teacher mlx:MODEL --samples 8 --temperature 0.8 --verify
    mlx-distill collect --prompts my-prompts.txt --teacher mlx:MODEL --samples 4 --temperature 0.8 --choose best
    """,
    keeps="Every answer received is in the ledger; the same command goes on from there.",
)
def command(config: CollectConfig, progress: Progress) -> Summary:
    """Ask a teacher every prompt and make a data set of its answers.

    Of several answers to a prompt, those that pass, or the best of them, can be kept.
    """
    from mlx_distill.collect.run import collect_from_spec, estimate_from_spec

    if config.dry_run:
        from mlx_distill.cli.estimate import summarise_estimate

        return _with_judge(summarise_estimate(estimate_from_spec(config)), config)
    from mlx_distill.judges.choosing import open_scorer

    confirm = _ask if sys.stdin.isatty() else None
    return summarise(collect_from_spec(config, progress, confirm=confirm, scorer=open_scorer(config)), config)


def _with_judge(found: Summary, config: CollectConfig) -> Summary:
    """A dry run's summary, which names a judge that is a model: it reads answers, so its cost cannot be told yet."""
    if config.choose != "best" or config.judge == "rubric":
        return found
    assert not callable(found.lines)
    line = f"Not in this: {config.judge}, who chooses the best, is asked about every answer. --max-cost holds for both."
    return replace(found, data={**found.data, "judge": config.judge}, lines=[*found.lines, line])


def _ask(question: str) -> bool:
    return click.confirm(question, err=True)


def summarise(manifest: Manifest, config: CollectConfig) -> Summary:
    """What a collection came to; failed where prompts are without a reply and nothing is known to hold it back."""
    failed = next((drop.count for drop in manifest.dropped if drop.reason == "failed"), 0)
    each = f", {manifest.samples} to each of {manifest.prompts} prompts" if manifest.samples > 1 else ""
    lines = [
        f"{manifest.answered} of {manifest.asked} {manifest.unit} answered by {manifest.teacher}{each}.",
        f"{config.out}: {_splits(manifest)}." if any(manifest.rows.values()) else "No data set yet.",
        *(f"Left out, {drop.reason}: {drop.count} ({_ids(drop)})." for drop in manifest.dropped),
        *_shares(manifest),
        *_quality(manifest),
        *_choice(manifest),
    ]
    if any(manifest.rows.values()):
        lines += [
            f"No prompt family falls into {split}; the split goes by a hash of the family, so more prompts fill it."
            for split, fraction in (("valid", config.valid_fraction), ("test", config.test_fraction))
            if fraction and not manifest.rows[split]
        ]
    lines += [*_money(manifest), *_next(manifest, config, failed)]
    facts = manifest.model_dump(mode="json")
    data = {"out": str(config.out), "failed": failed, "usable_per_prompt": _usable(manifest), **facts}
    return Summary(data, lines, failed=failed > 0)


def _splits(manifest: Manifest) -> str:
    return ", ".join(
        f"{split} {rows} rows ({manifest.families[split]} families)" for split, rows in manifest.rows.items()
    )


def _ids(drop: DropCount) -> str:
    shown = ", ".join(drop.prompt_ids[:_IDS_SHOWN])
    more = len(drop.prompt_ids) - _IDS_SHOWN
    return shown if more <= 0 else f"{shown} and {more} more"


def _shares(manifest: Manifest) -> Iterator[str]:
    """Which share of what was asked has a whole answer, a cut one, a refusal or none."""
    counts = {"whole": manifest.answered}
    for drop in manifest.dropped:
        if drop.reason in ("truncated", "refused", "failed"):
            counts[drop.reason] = drop.count
    shares = ", ".join(f"{name} {count / manifest.asked:.1%}" for name, count in counts.items())
    yield f"Of all {manifest.unit}: {shares}."
    if manifest.refusals:
        categories = ", ".join(f"{name} {count}" for name, count in sorted(manifest.refusals.items()))
        yield f"Refusals by the provider's category: {categories}."
    if manifest.asked_again:
        yield (
            f"{manifest.asked_again} answers were cut by their limit and asked again with more tokens, "
            f"up to {manifest.max_tokens_ceiling:,}; both are paid for."
        )


def _quality(manifest: Manifest) -> Iterator[str]:
    for prompt, held_out in list(manifest.contaminated.items())[:_IDS_SHOWN]:
        yield f"Too close to the held-out prompt {held_out}: {prompt}."
    if manifest.credentials:
        yield f"Looks like credentials: {', '.join(f'{kind} {n}' for kind, n in manifest.credentials.items())}."
    if (checked := manifest.verification) is not None:
        yield (
            f"Verified: {checked.passed} answers pass, {checked.failed} fail, {checked.without_code} hold no Python; "
            f"{checked.tests} tests ran (isolation: {checked.isolation or 'nothing ran'})."
        )
        if checked.failing:
            shown = ", ".join(checked.failing[:_IDS_SHOWN])
            yield f"Failing: {shown}{' and more' if len(checked.failing) > _IDS_SHOWN else ''}."


def _usable(manifest: Manifest) -> float | None:
    """Answers a prompt that nothing but a choice or their likeness to another leaves out; None without a data set."""
    if not any(manifest.rows.values()):
        return None
    # Chosen is from these, and duplicates are found among the chosen.
    out = sum(drop.count for drop in manifest.dropped if drop.reason in ("not chosen", "duplicate"))
    return (sum(manifest.rows.values()) + out) / manifest.prompts


def _choice(manifest: Manifest) -> Iterator[str]:
    """How many of the answers to a prompt could be used, and who chose among them."""
    if manifest.samples > 1 and (usable := _usable(manifest)) is not None:
        passed = "passed" if manifest.verification is not None else "could be used"
        yield f"Of {manifest.samples} samples a prompt {usable:.1f} {passed} on average."
        if manifest.none_left:
            shown = ", ".join(manifest.none_left[:_IDS_SHOWN])
            more = len(manifest.none_left) - _IDS_SHOWN
            yield f"No answer {passed}: {shown}{f' and {more} more' if more > 0 else ''}."
    if manifest.chosen_by in ("first", "shortest"):
        yield f"Of the answers to a prompt the {manifest.chosen_by} is a row."
    elif manifest.chosen_by is not None:
        yield f"Of the answers to a prompt the best is a row, as {manifest.chosen_by} scores them."
    if manifest.unscored:
        yield (
            f"{manifest.unscored} answers have no verdict that can be read: they count as nothing, not as 0. The same "
            "command asks again, but for refusals, which stand."
        )
    if manifest.judge_usd:
        yield f"The judge has cost ${manifest.judge_usd:.2f} at most."


def _money(manifest: Manifest) -> Iterator[str]:
    usage = manifest.usage
    if usage.output_tokens:
        cost = f"${manifest.cost_usd:.2f} at the prices of {manifest.prices_dated}"
        by_batch = f", {manifest.batch_answers:,} answers at the batch price" if manifest.batch_answers else ""
        yield (
            f"{usage.input_tokens:,} tokens in, {usage.output_tokens:,} out: "
            f"{cost if manifest.prices_dated else 'cost not known, this model has no listed price'}{by_batch}."
        )
    if manifest.cut_sendings:
        times = "sending was" if manifest.cut_sendings == 1 else "sendings were"
        most = f", at most ${manifest.cut_usd:.2f}" if manifest.cut_usd else ""
        yield (
            f"{manifest.cut_sendings} {times} cut off by the network or the end of a process: each may have been "
            f"billed without an answer{most}."
        )


def _next(manifest: Manifest, config: CollectConfig, failed: int) -> Iterator[str]:
    if failed:
        unit = manifest.unit.removesuffix("s") if failed == 1 else manifest.unit
        yield f"{failed} {unit} failed. The same command asks again, only what failed."
    if manifest.in_batch:
        yield f"{manifest.in_batch:,} are in a batch. The same command picks its answers up."
    if manifest.unsent and config.max_cost is not None:
        yield (
            f"{manifest.unsent:,} are left: the worst case of one more could pass --max-cost {config.max_cost:g}. "
            "To go on, give the same command with a higher one."
        )
    if not (failed or manifest.in_batch or manifest.unsent):
        yield f"Next:  mlx-distill train --data {config.out} --run adapters/{manifest.name}"
