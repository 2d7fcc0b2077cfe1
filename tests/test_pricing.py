"""What a token costs: exact figures, and never a price for what has none."""

from __future__ import annotations

from datetime import date

import pytest

from mlx_distill.pricing import FREE, PRICES_DATED, Price, listed_prices, price_of
from mlx_distill.records import Usage


@pytest.mark.parametrize(
    ("model", "online", "batch"),
    [
        ("claude-sonnet-4-6", 18.0, 9.0),
        ("claude-opus-4-6", 30.0, 15.0),
        ("claude-sonnet-5-5", 12.0, 6.0),
        ("claude-opus-5-5", 24.0, 12.0),
        ("claude-haiku-4-5", 6.0, 3.0),
    ],
)
def test_a_million_tokens_in_and_out(model: str, online: float, batch: float) -> None:
    price = price_of(f"anthropic:{model}")
    assert price is not None
    usage = Usage(input_tokens=1_000_000, output_tokens=1_000_000)
    assert price.cost(usage) == online
    assert price.cost(usage, batch=True) == batch


def test_input_and_output_have_their_own_price() -> None:
    price = Price(3, 15)
    assert price.cost(Usage(input_tokens=1_000)) == pytest.approx(0.003, abs=1e-12)
    assert price.cost(Usage(output_tokens=1_000)) == pytest.approx(0.015, abs=1e-12)
    assert price.cost(Usage()) == 0.0


def test_the_collection_that_was_cut_at_its_limit() -> None:
    """104 answers of 1,024 tokens each and some 50 tokens of prompt came to $1.61."""
    price = price_of("anthropic:claude-sonnet-4-6")
    assert price is not None
    assert round(price.cost(Usage(input_tokens=104 * 45, output_tokens=104 * 1024)), 2) == 1.61


@pytest.mark.parametrize("spec", ["anthropic:claude-sonnet-4-6-20260101", "anthropic:claude-sonnet-4-6-latest"])
def test_a_dated_model_has_the_price_of_its_base(spec: str) -> None:
    assert price_of(spec) == price_of("anthropic:claude-sonnet-4-6")


@pytest.mark.parametrize(
    "spec",
    [
        "anthropic:claude-sonnet-4-60",  # not a date of claude-sonnet-4-6
        "anthropic:claude-sonnet-4",
        "anthropic:claude-sonnet",
        "anthropic:my-claude-sonnet-4-6",
        "anthropic:Claude-Sonnet-4-6",
        "anthropic:",
        "anthropic",
        "claude-sonnet-4-6",
        "openai:gpt-9",
        "openai:claude-sonnet-4-6",
        "openai:recorded:x",
        "Recorded:x",
        "nobody:x",
        "",
        ":",
    ],
)
def test_what_is_not_listed_has_no_price(spec: str) -> None:
    assert price_of(spec) is None


@pytest.mark.parametrize("spec", ["recorded:data/starter", "recorded:", "mlx:Qwen/Qwen2.5-7B-Instruct"])
def test_what_sends_no_bill_is_free(spec: str) -> None:
    price = price_of(spec)
    assert price == FREE
    assert price.cost(Usage(input_tokens=10**9, output_tokens=10**9), batch=True) == 0.0


def test_every_listed_price_can_be_found_and_is_plausible() -> None:
    prices = listed_prices()
    assert len(prices) == 5
    for model, price in prices.items():
        assert price_of(f"anthropic:{model}") == price
        assert 0 < price.input < price.output
        assert price.batch_factor == 0.5


def test_the_table_is_not_handed_out() -> None:
    listed_prices().clear()
    assert listed_prices()


def test_the_table_is_dated() -> None:
    assert date.fromisoformat(PRICES_DATED) <= date(2100, 1, 1)
