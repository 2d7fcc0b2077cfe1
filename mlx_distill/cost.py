"""What answers cost at any number of prompts: averages times listed prices, with any teacher.

Reads: what `averages` reads.  Writes: nothing.

`collect --dry-run` reckons what one prompt file would still cost; this takes what answers came to and scales it.
Another teacher is taken to write answers as long as those that were measured. No discount but the batch price is
assumed, and the same mixture of prompts. A price that is not listed is None, never 0.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mlx_distill.averages import Averages, measure_comparison, measure_data
from mlx_distill.config import CostConfig
from mlx_distill.errors import ConfigError
from mlx_distill.pricing import FREE, PRICES_DATED, listed_prices, price_of
from mlx_distill.teachers.registry import TEACHERS


@dataclass(frozen=True)
class CostRow:
    """What so many prompts to one teacher would take.

    Attributes:
        price: "none" for a teacher that sends no bill, "unknown" for one whose price is not listed.
        online: US dollars; None where the price is not known.
        batch: The same by way of batches; None also where there are none.
        seconds: Wall time without batches; None where none was measured with this teacher.
    """

    teacher: str
    prompts: int
    price: Literal["listed", "none", "unknown"]
    online: float | None
    batch: float | None
    seconds: float | None


@dataclass(frozen=True)
class CostTable:
    """What collections of several sizes would cost with several teachers.

    Attributes:
        rows: By teacher, dearest first where none was named, then by number of prompts.
        dated: Day of the price table.
    """

    averages: Averages
    rows: tuple[CostRow, ...]
    dated: str = PRICES_DATED

    @property
    def teachers(self) -> tuple[str, ...]:
        """In the order of the rows."""
        return tuple(dict.fromkeys(row.teacher for row in self.rows))

    def of(self, price: Literal["listed", "none", "unknown"]) -> tuple[str, ...]:
        """The teachers whose price is that."""
        return tuple(dict.fromkeys(row.teacher for row in self.rows if row.price == price))


def cost(config: CostConfig) -> CostTable:
    """Measure, or take what is given, and scale it.

    Raises:
        ConfigError: A teacher is named by no spec, or a number of prompts is none.
        InputError: The folder holds no answers whose tokens were counted, or cannot be read.
        FolderError: Its ledger cannot be opened.
    """
    named = tuple(dict.fromkeys(_spec(part.strip()) for part in config.teacher.split(",") if part.strip()))
    prompts = sorted({_number(part.strip()) for part in config.prompts.split(",")})
    averages = _averages(config, named)
    return CostTable(
        averages, cost_rows(averages, named or _all_priced(averages), prompts, concurrency=config.concurrency)
    )


def cost_rows(
    averages: Averages, teachers: Iterable[str], prompts: Sequence[int], *, concurrency: int | None = None
) -> tuple[CostRow, ...]:
    """What each teacher would take for each number of prompts.

    Args:
        teachers: Specs.
        concurrency: As for `Averages.seconds_for`.
    """
    rows = []
    for teacher in teachers:
        price = price_of(teacher)
        kind: Literal["listed", "none", "unknown"] = (
            "unknown" if price is None else "none" if price == FREE else "listed"
        )
        for number in prompts:
            rows.append(
                CostRow(
                    teacher,
                    number,
                    kind,
                    None if price is None else averages.dollars(price, number),
                    averages.dollars(price, number, batch=True) if price is not None and kind == "listed" else None,
                    averages.seconds_for(number, concurrency) if teacher == averages.teacher else None,
                )
            )
    return tuple(rows)


def _averages(config: CostConfig, teachers: Sequence[str]) -> Averages:
    if config.data is not None:
        return measure_data(config.data, teachers)
    if config.comparison is not None:
        return measure_comparison(config.comparison, teachers)
    assert config.input_tokens is not None and config.output_tokens is not None
    return Averages(config.input_tokens, config.output_tokens, "given")


def _all_priced(averages: Averages) -> tuple[str, ...]:
    """The teacher that was measured, where its answers came from a model, and all of the price table, dearest first."""
    prices = {f"anthropic:{name}": price for name, price in listed_prices().items()}
    listed = sorted(prices, key=lambda spec: averages.dollars(prices[spec], 1_000_000), reverse=True)
    measured = averages.teacher
    if measured is None or measured in prices or measured.startswith("recorded:"):
        return tuple(listed)
    return (measured, *listed)


def _spec(spec: str) -> str:
    """The spec as it is, if it is one."""
    provider, _, name = spec.partition(":")
    if provider in TEACHERS and name.strip():
        return spec
    near = difflib.get_close_matches(spec, [f"anthropic:{name}" for name in listed_prices()], n=1, cutoff=0.5)
    guess = f" Did you mean {near[0]}?" if near else ""
    raise ConfigError(
        f"unknown teacher {spec!r}.{guess}", hint=f"Known: {', '.join(f'{known}:NAME' for known in TEACHERS)}."
    )


def _number(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,11}", text):
        raise ConfigError(
            f"--prompts: {text!r} is not a whole number above 0 and below a trillion.",
            hint="For example:  --prompts 1000,10000,1000000",
        )
    return int(text)
