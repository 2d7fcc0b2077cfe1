"""The figures of all runs, as one object for JSON and as Markdown that reads well in a terminal too."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from _bench.contenders import Result
from _bench.flops import read_shape, training_flops
from _bench.workload import Workload

NAMES = {
    "ours": "`mlx-distill train`",
    "ours-limited": "`mlx-distill train --memory-limit`",
    "mlx-lm": "`mlx_lm.lora`",
    "trl": "TRL `SFTTrainer`",
}

_HEAD = (
    "", "real tokens/s", "× mlx_lm.lora", "training, s", "whole process, s", "peak memory, GB",
    "train loss", "validation loss", "GFLOP/s", "of matmul peak",
)  # fmt: skip

#: Flags that name a place.
_PLACES = ("--json", "--markdown", "--keep", "--environment")

#: Characters of the widest cell that others are aligned with.
_WIDEST = 50


def machine() -> dict[str, Any]:
    """What this runs on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_GiB": round(memory / 2**30),
        "system": platform.platform(),
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "command": shlex.join(["scripts/bench_train", *_deciding(sys.argv[1:])]),
    }


def _deciding(arguments: Sequence[str]) -> Iterator[str]:
    """The arguments that decide the figures, and not just where something is kept."""
    waiting = iter(arguments)
    for argument in waiting:
        if argument.partition("=")[0] not in _PLACES:
            yield argument
        elif "=" not in argument:
            next(waiting, None)


def _processor() -> str:
    if sys.platform == "darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(found, 'unknown')}, {platform.machine()}"


def figures(
    work: Workload, results: Sequence[Result], facts: dict[str, Any], peak: float, losses: dict[str, list[float]]
) -> list[dict[str, Any]]:
    """One object a run.

    Args:
        peak: GFLOP/s of a matrix product.
        losses: Validation losses of each run, by "CONTENDER-TURN".
    """
    shape = read_shape(work.model)
    tokens = work.epochs * sum(n for n, _ in facts["train"])
    rows = []
    for result in results:
        row: dict[str, Any] = {"contender": result.contender, "turn": result.turn, "failure": result.failure}
        if result.outcome is not None:
            row |= {
                "process_seconds": result.outcome.seconds,
                "processor_seconds": result.outcome.processor_seconds,
                "peak_bytes": result.outcome.peak_bytes,
            }
        if result.trained is not None:
            # Where ours keeps what the frozen layers give, if it does.
            keeps = result.trained.notes.get("plan", {}).get("prefix_cache", "off") != "off"
            flops = training_flops(shape, facts["train"], epochs=work.epochs, trained=work.layers, keeps_frozen=keeps)
            speed = flops / result.trained.seconds / 1e9
            row |= {
                "training_seconds": result.trained.seconds,
                "tokens_per_second": tokens / result.trained.seconds,
                "gflops": speed,
                "share_of_peak": speed / peak,
                "train_losses": result.trained.epoch_losses(work.steps_per_epoch),
                "valid_losses": losses.get(f"{result.contender}-{result.turn}"),
                "targets_an_epoch": sum(step.targets for step in result.trained.steps[: work.steps_per_epoch]),
                "trainable_parameters": result.trained.trainable,
                "notes": result.trained.notes,
                "steps": [asdict(step) for step in result.trained.steps],
            }
        rows.append(row)
    return rows


def speed_table(rows: Sequence[dict[str, Any]], limit: str | None) -> str:
    """A line a contender: medians over its runs, with the range where there are several."""
    good = _by_contender([row for row in rows if row["failure"] is None])
    reference = statistics.median(r["tokens_per_second"] for r in good["mlx-lm"]) if "mlx-lm" in good else None
    lines = []
    for contender, tried in _by_contender(rows).items():
        name = NAMES[contender] + (f" {limit}" if contender == "ours-limited" and limit else "")
        if contender not in good:
            lines.append([name, f"failed: {tried[0]['failure']}", *[""] * (len(_HEAD) - 2)])
            continue
        runs = good[contender]
        speed = statistics.median(r["tokens_per_second"] for r in runs)
        lines.append(
            [
                name,
                _spread([r["tokens_per_second"] for r in runs], "{:,.0f}"),
                f"{speed / reference:.2f}" if reference else "",
                _spread([r["training_seconds"] for r in runs], "{:,.0f}"),
                _spread([r["process_seconds"] for r in runs], "{:,.0f}"),
                _spread([r["peak_bytes"] / 1e9 for r in runs], "{:.2f}"),
                f"{runs[-1]['train_losses'][-1]:.3f}",
                f"{runs[-1]['valid_losses'][-1]:.3f}" if runs[-1]["valid_losses"] else "",
                f"{statistics.median(r['gflops'] for r in runs):,.0f}",
                f"{statistics.median(r['share_of_peak'] for r in runs):.0%}",
            ]
        )
    return markdown(_HEAD, lines)


def loss_table(rows: Sequence[dict[str, Any]], epochs: int, base: float | None) -> str:
    """Training and validation loss of each contender's last run, after each epoch; nothing if none ended."""
    lines = []
    for contender, runs in _by_contender([row for row in rows if row["failure"] is None]).items():
        last = runs[-1]
        lines.append([f"{NAMES[contender]}, train", "", *(f"{loss:.4f}" for loss in last["train_losses"])])
        if last["valid_losses"]:
            before = f"{base:.4f}" if base is not None else ""
            lines.append([f"{NAMES[contender]}, validation", before, *(f"{loss:.4f}" for loss in last["valid_losses"])])
    if not lines:
        return ""
    return markdown(("loss after epoch", *map(str, range(epochs + 1))), lines)


def caption(
    work: Workload,
    machine: dict[str, Any],
    facts: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    peak: float,
    trial: dict[str, float | str],
) -> str:
    """What the tables were measured on, with what, how and when."""
    tokens = sum(n for n, _ in facts["train"])
    shortest, longest = (choose(n for n, _ in facts["train"]) for choose in (min, max))
    versions = dict(facts["versions"])
    notes = {row["contender"]: row["notes"] for row in rows if row["failure"] is None}
    versions |= notes.get("trl", {}).get("versions", {})
    sentences = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_GiB']} GiB; {machine['system']}, Python "
        f"{machine['python']}, {machine['date']}.",
        f"{facts['model']}, {work.rows} rows of {shortest} to {longest} tokens ({tokens:,} in all), {work.epochs} "
        f"epoch{'s' * (work.epochs > 1)}, LoRA on the last {work.layers} layers.",
        f"MLX on {facts['device']}; matrix product {peak:,.0f} GFLOP/s.",
    ]
    if "mlx-lm" in notes:
        found = ", ".join(
            f"{name} {value:.1f} s" if isinstance(value, float) else f"{name} {value}" for name, value in trial.items()
        )
        sentences.append(
            f"`mlx_lm.lora` with mx.compile {'on' if notes['mlx-lm']['compiled'] else 'off'}"
            + (f" (fastest step of a trial: {found})" if found else "")
            + f", the allocator {'set as ours is' if notes['mlx-lm']['allocator'] else 'as it comes'}."
        )
    if "trl" in notes:
        sentences.append(
            f"TRL on {notes['trl']['device']} with {notes['trl']['blas']}, {notes['trl']['threads']} threads, rows "
            f"sampled {notes['trl']['sampling']}."
        )
    sentences.append(", ".join(f"{name} {number}" for name, number in versions.items()) + ".")
    sentences.append(f"`{machine['command']}`")
    return textwrap.fill(" ".join(sentences), 118, break_long_words=False, break_on_hyphens=False) + "\n"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown, its columns aligned: the first to the left, the others to the right."""
    columns = list(zip(head, *lines, strict=True))
    # A reason why something failed is longer than any column should be.
    widths = [max(3, *(len(cell) for cell in column if len(cell) <= _WIDEST)) for column in columns]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def cells(line: Sequence[str]) -> list[str]:
        return [
            line[0].ljust(widths[0]),
            *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True)),
        ]

    return "".join(f"| {' | '.join(line)} |\n" for line in (cells(head), rule, *map(cells, lines)))


def _by_contender(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["contender"], []).append(row)
    return found


def _spread(values: Sequence[float], form: str) -> str:
    middle = form.format(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({form.format(min(values))}–{form.format(max(values))})"
