"""What a token costs, in US dollars, on the date of the table.

A model whose price is not listed costs `None`, never 0: an unknown price must not pass for a free one.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_distill.records import Usage

PRICES_DATED = "2026-11-01"


@dataclass(frozen=True)
class Price:
    """US dollars a million tokens."""

    input: float
    output: float
    batch_factor: float = 0.5

    def cost(self, usage: Usage, *, batch: bool = False) -> float:
        """Cost of a request in US dollars."""
        full = (usage.input_tokens * self.input + usage.output_tokens * self.output) / 1e6
        return full * self.batch_factor if batch else full


FREE = Price(0.0, 0.0)

#: Providers that send no bill: a record, and a model on this machine.
_FREE = ("recorded", "mlx")

_ANTHROPIC = {
    "claude-sonnet-4-6": Price(3, 15),
    "claude-opus-4-6": Price(5, 25),
    "claude-sonnet-5-5": Price(2, 10),
    "claude-opus-5-5": Price(4, 20),
    "claude-haiku-4-5": Price(1, 5),
}


def price_of(teacher: str) -> Price | None:
    """The price of a teacher named by its spec, such as `anthropic:claude-sonnet-4-6`.

    Returns:
        None where the price is not known. A dated model id (`…-20260101`) has the price of its base id.
    """
    provider, _, model = teacher.partition(":")
    if provider in _FREE:
        return FREE
    if provider != "anthropic":
        return None
    matches = [known for known in _ANTHROPIC if model == known or model.startswith(known + "-")]
    return _ANTHROPIC[max(matches, key=len)] if matches else None


def listed_prices() -> dict[str, Price]:
    """All models of the table by name, for a comparison of what they would cost."""
    return dict(_ANTHROPIC)
