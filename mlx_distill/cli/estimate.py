"""What `collect --dry-run` prints."""

from __future__ import annotations

from mlx_distill.cli.console import Summary
from mlx_distill.collect.estimate import CHARACTERS_PER_TOKEN, TYPICAL_ANSWER_TOKENS, Estimate
from mlx_distill.manifest import unit_of


def summarise_estimate(found: Estimate) -> Summary:
    """Requests, tokens and cost, online and in batches, and what larger collections would cost."""
    answered = found.asked - found.requests
    unit = unit_of(found.samples)
    each = "" if found.samples == 1 else f", {found.samples} answers each"
    lines = [
        f"{found.requests:,} requests to {found.teacher}"
        + (f"; {answered:,} of {found.asked:,} {unit} have their answer, or are in a batch." if answered else "."),
        f"{found.input_tokens:,} tokens in, about {found.output_tokens:,} out, {_source(found)}.",
    ]
    if found.expected is None:
        lines.append("The price of this teacher is not listed: its cost is not known.")
        return Summary(found.to_dict(), lines)
    lines += [
        "",
        *_table(
            ("", "online", "batch"),
            [
                ("expected", _usd(found.expected), _usd(found.expected_batch)),
                ("worst case", _usd(found.worst), _usd(found.worst_batch)),
            ],
        ),
        "",
        *_table(
            (f"prompts{each}", "online", "batch"),
            [(f"{row.prompts:,}", _usd(row.online), _usd(row.batch)) for row in found.scale],
        ),
        "",
        f"At the prices of {found.prices_dated}. The worst case: every answer uses up every limit up to the ceiling.",
    ]
    if found.spent:
        lines.append(f"Spent by this ledger so far, at most: {_usd(found.spent)}.")
    lines.append("Nothing was sent. To set a wall:  --max-cost USD")
    return Summary(found.to_dict(), lines)


def _source(found: Estimate) -> str:
    if found.source == "measured":
        return f"as measured on {found.replies:,} replies in this ledger"
    return (
        f"reckoned from characters ({CHARACTERS_PER_TOKEN:g} a token) and {TYPICAL_ANSWER_TOKENS:,} tokens an answer; "
        "nothing is measured yet"
    )


def _usd(amount: float | None) -> str:
    return "" if amount is None else f"${amount:,.2f}"


def _table(head: tuple[str, str, str], rows: list[tuple[str, str, str]]) -> list[str]:
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(3)]
    return [f"  {row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}".rstrip() for row in (head, *rows)]
