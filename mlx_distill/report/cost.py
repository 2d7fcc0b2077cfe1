"""What a collection of any size would cost with a teacher that is paid by the token.

Only the tokens of the collection at hand are measured, and its price where it had one. Everything else is that
average, scaled: no discount but the batch price, and the same mixture of prompts, is assumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mlx_distill.averages import Averages, averages_of_answers, averages_of_run
from mlx_distill.pricing import FREE, PRICES_DATED, Price, listed_prices, price_of
from mlx_distill.report.evidence import Evidence

SCALES = (104, 10_000, 1_000_000, 16_000_000)


@dataclass(frozen=True)
class PricedModel:
    """A model and what its tokens cost."""

    name: str
    price: Price

    def cost(self, averages: Averages, prompts: int, *, batch: bool = False) -> float:
        """US dollars for `prompts` prompts of average length."""
        return averages.dollars(self.price, prompts, batch=batch)


@dataclass(frozen=True)
class Spent:
    """What the collection at hand really cost."""

    prompts: int
    dollars: float
    dated: str | None


@dataclass(frozen=True)
class CostScaling:
    """Cost against the number of prompts.

    Attributes:
        of_teacher: Whether `models` is one teacher, not models to choose from.
        models: Dearest first.
        projection: What was not measured, in a sentence.
        spent: None where nothing was paid, or it is not known.
    """

    averages: Averages
    of_teacher: bool
    models: tuple[PricedModel, ...]
    projection: str
    spent: Spent | None = None

    @property
    def basis(self) -> str:
        """What was measured, in a sentence."""
        return self.averages.basis


def scaling_of(averages: Averages, prices: Mapping[str, Price], projection: str) -> CostScaling:
    """How the cost grows with each of some models.

    Args:
        prices: By the model's name.
    """
    models = [PricedModel(name, price) for name, price in prices.items()]
    models.sort(key=lambda model: model.cost(averages, 1_000_000), reverse=True)
    return CostScaling(averages, len(models) == 1, tuple(models), projection)


def cost_scaling(evidence: Evidence) -> CostScaling | None:
    """How the cost grows; None where no tokens are known."""
    averages = averages_of_run(evidence.run) if evidence.run else None
    averages = averages or averages_of_answers(evidence.samples, evidence.record)
    if averages is None:
        return None
    manifest = evidence.manifest
    teacher = manifest.teacher if manifest else evidence.teacher
    priced = f"at prices of {PRICES_DATED}; the Batch API costs half"
    price = price_of(teacher) if teacher else None
    if teacher and price not in (None, FREE):
        own = {teacher.partition(":")[2]: price}
        scaling = scaling_of(averages, own, f"Projected: all other numbers, {priced}.")
    else:
        why = "has no listed price"
        if price == FREE:
            recorded = teacher is not None and teacher.startswith("recorded:")
            why = "is recorded and cost nothing" if recorded else "answers on a machine of its user's, for no price"
        longer = f"Projected: the teacher {why}; answers this long from listed models, {priced}."
        scaling = scaling_of(averages, listed_prices(), longer)
    if manifest and manifest.cost_usd > 0:
        return replace(scaling, spent=Spent(manifest.answered, manifest.cost_usd, manifest.prices_dated))
    return scaling
