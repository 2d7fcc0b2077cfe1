"""`mlx-distill cost`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_distill.cli.columns import Column, table
from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import CostConfig
from mlx_distill.errors import ConfigError
from mlx_distill.progress import Progress

if TYPE_CHECKING:
    from mlx_distill.averages import Averages
    from mlx_distill.cost import CostRow, CostTable

_NOT_MEASURED = "–"

#: From here on a time is told in days.
_DAYS_FROM_SECONDS = 2 * 86_400


@make_command(
    CostConfig,
    examples="""
    mlx-distill cost --data data/coding
    mlx-distill cost --data data/coding --teacher anthropic:claude-opus-5-5 --prompts 10000,1000000 --chart cost.png
    mlx-distill cost --comparison visuals/demo
    mlx-distill cost --input-tokens 60 --output-tokens 1500 --json
    """,
    keeps="Nothing was sent; an older chart is as it was.",
)
def command(config: CostConfig, progress: Progress) -> Summary:
    """What a collection of any size would cost, with any teacher.

    From the measured averages of a collection or a comparison, or from numbers of tokens given by hand, and the price
    table: online and in batches. A local model costs time instead of money. The chart goes from 104 to 16 million
    prompts, whatever the table shows. Needs no key.
    """
    from mlx_distill.cost import cost

    if config.chart is not None and config.chart.suffix.lower() != ".png":
        raise ConfigError(f"--chart {config.chart}: a chart is a .png.", hint="For example:  --chart cost.png")
    found = cost(config)
    if config.chart is not None:
        _draw(config.chart, found)
    data = {
        "averages": asdict(found.averages),
        "rows": [asdict(row) for row in found.rows],
        "prices_dated": found.dated,
        "concurrency": config.concurrency,
        "chart": None if config.chart is None else str(config.chart),
    }
    return Summary(data, lambda width: [*_lines(found, config, width)])


def _draw(path: Path, found: CostTable) -> None:
    from mlx_distill.pricing import price_of
    from mlx_distill.report.charts.cost import cost_scaling
    from mlx_distill.report.cost import scaling_of

    prices = {spec.partition(":")[2]: price for spec in found.of("listed") if (price := price_of(spec))}
    if not prices:
        raise ConfigError(
            "there is nothing to draw: none of these teachers has a listed price.",
            hint="Leave --chart out, or name others:  --teacher anthropic:MODEL",
        )
    projection = f"Projected: all prices, from the list of {found.dated}; batches cost half."
    cost_scaling(path, scaling_of(found.averages, prices, projection))


def _lines(found: CostTable, config: CostConfig, width: int | None) -> Iterator[str]:
    yield found.averages.basis
    yield from _shares(found.averages)
    yield ""
    yield from table(_columns(found), width)
    yield ""
    yield f"At the prices of {found.dated}, without any discount but the batch price."
    for spec in found.of("unknown"):
        yield f"No price is listed for {spec}: its cost is not known."
    for spec in found.of("none"):
        timed = any(row.seconds for row in found.rows if row.teacher == spec)
        recorded = spec.startswith("recorded:")
        takes = "" if timed or recorded else " Measure its time with a collection of its answers, and --data."
        yield f"{spec} sends no bill{'' if recorded else ': it costs time on this machine'}.{takes}"
    if found.averages.input_tokens is None:
        yield (
            "The tokens of the prompts are missing in all of this. To count them:  "
            f"--input-tokens N --output-tokens {round(found.averages.output_tokens)}"
        )
    if any(row.seconds for row in found.rows):
        yield _pace(found.averages, config.concurrency)
    if config.chart is not None:
        yield f"Chart: {config.chart}"


def _shares(averages: Averages) -> Iterator[str]:
    """What of the replies was paid for without being an answer."""
    if not averages.replies:
        return
    shares = [f"{averages.answers / averages.replies:.1%} whole", f"{averages.cut / averages.replies:.1%} cut"]
    shares.append(f"{averages.refused / averages.replies:.1%} refused")
    repeated = f"; {averages.repeated:,} sent again after a failure" if averages.repeated else ""
    yield f"Of {averages.replies:,} replies: {', '.join(shares)}{repeated}. What was cut or refused is paid for too."


def _pace(averages: Averages, concurrency: int | None) -> str:
    measured = f"{averages.under_way:.1f} under way at once" if averages.under_way else "how many at once is not known"
    at_once = f"{concurrency}" if concurrency else f"{averages.under_way:.1f}" if averages.under_way else "1"
    return (
        f"Time: {averages.seconds:.1f} s an answer, as measured ({measured}), with {at_once} at once here. Rate "
        "limits, or a local model with more to do at once, may take longer. A batch takes up to a day."
    )


def _columns(found: CostTable) -> list[Column]:
    from mlx_distill.report.wording import visible

    rows = found.rows
    return [
        Column("teacher", [visible(row.teacher) for row in rows]),
        Column("prompts", [f"{row.prompts:,}" for row in rows], right=True),
        Column("online", [_online(row) for row in rows], right=True),
        Column("batch", [_batch(row) for row in rows], right=True),
        Column("time", [_time(row.seconds) for row in rows], right=True),
    ]


def _online(row: CostRow) -> str:
    from mlx_distill.report.wording import money

    return {"none": "no bill", "unknown": "not known"}.get(row.price) or money(row.online)


def _batch(row: CostRow) -> str:
    from mlx_distill.report.wording import money

    return {"none": _NOT_MEASURED, "unknown": "not known"}.get(row.price) or money(row.batch)


def _time(seconds: float | None) -> str:
    from mlx_distill.report.wording import duration

    if seconds is None:
        return _NOT_MEASURED
    return duration(seconds) if seconds < _DAYS_FROM_SECONDS else f"{seconds / 86_400:,.0f} days"
