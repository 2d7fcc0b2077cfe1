"""`mlx-distill bench`."""

from __future__ import annotations

import shlex
import sys

from mlx_distill.cli.columns import Column, table
from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import BenchConfig
from mlx_distill.progress import Progress


@make_command(
    BenchConfig,
    examples="""
    mlx-distill bench
    mlx-distill bench --preset original
    mlx-distill bench --model smollm2-135m --backends mlx,torch --quick
    mlx-distill bench --data data/mine --model smollm2-135m --repeats 5
    """,
    keeps="No process is left, and nothing was written.",
)
def command(config: BenchConfig, progress: Progress) -> Summary:
    """Time MLX against PyTorch on the same batches.

    Each backend runs in a process of its own, turn by turn. Before anything is timed, their losses are compared: a
    bench of two different computations is refused. Results are in visuals/bench: a table to paste into an issue, a
    page, a chart, and every figure as JSON.
    """
    from mlx_distill.bench.page import headline, notes, projection_rows, rows_of
    from mlx_distill.bench.run import bench

    record = bench(config, progress, command=f"mlx-distill {shlex.join(sys.argv[1:])}")
    lines = [
        headline(record),
        "",
        *_table(rows_of(record)),
        "",
        *notes(record),
        "",
        *_table(projection_rows(record)),
        "",
        f"{config.out}/bench.md is for an issue; bench.html, bench.png and bench.json are beside it.",
    ]
    failed = any(figures.failure for figures in record.figures)
    return Summary(record.model_dump(mode="json", exclude_none=True), lines, failed=failed)


def _table(rows: list[list[str]]) -> list[str]:
    head, *body = rows
    return table([Column(name, [row[at] for row in body]) for at, name in enumerate(head)], None)
