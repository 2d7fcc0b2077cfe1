"""What a collection of any size would cost with a teacher that is paid by the token.

Only the tokens of the collection at hand are measured, and its price where it had one. Everything else is that
average, scaled: no discount but the batch price, and the same mixture of prompts, is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_distill.pricing import PRICES_DATED, Price, listed_prices, price_of
from mlx_distill.records import Usage
from mlx_distill.report.evidence import Evidence
from mlx_distill.report.wording import plural

SCALES = (104, 10_000, 1_000_000, 16_000_000)


@dataclass(frozen=True)
class TokenAverages:
    """Tokens of a prompt and of its answer, averaged.

    Attributes:
        answers: Over how many.
        counted: How they were counted, as the end of a sentence.
        has_input: False where only the answers could be counted.
    """

    input: float
    output: float
    answers: int
    counted: str
    has_input: bool = True


@dataclass(frozen=True)
class PricedModel:
    """A model and what its tokens cost."""

    name: str
    price: Price

    def cost(self, averages: TokenAverages, prompts: int, *, batch: bool = False) -> float:
        """US dollars for `prompts` prompts of average length."""
        whole = Usage(input_tokens=round(averages.input * prompts), output_tokens=round(averages.output * prompts))
        return self.price.cost(whole, batch=batch)


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
        teacher: Its spec, if known.
        of_teacher: Whether `models` is the teacher itself, not models listed for comparison.
        models: Dearest first.
        spent: None where nothing was paid, or it is not known.
        dated: Day of the price table.
    """

    teacher: str | None
    of_teacher: bool
    averages: TokenAverages
    models: tuple[PricedModel, ...]
    spent: Spent | None
    dated: str = PRICES_DATED

    @property
    def basis(self) -> str:
        """What was measured, in a sentence."""
        a = self.averages
        tokens = f"{a.input:,.0f} tokens in, {a.output:,.0f} out" if a.has_input else f"{a.output:,.0f} tokens out"
        rest = "" if a.has_input else "; the prompts' own tokens are not counted"
        return f"Measured: {tokens} a prompt, the average of {plural(a.answers, 'answer')}, {a.counted}{rest}."

    @property
    def projection(self) -> str:
        """What was not, in a sentence."""
        priced = f"at prices of {self.dated}; the Batch API costs half"
        if self.of_teacher:
            return f"Projected: all other numbers, {priced}."
        if self.teacher and self.teacher.startswith("recorded:"):
            return (
                f"Projected: the teacher is recorded and cost nothing; answers this long from listed models, {priced}."
            )
        return f"Projected: the teacher has no listed price; answers this long from listed models, {priced}."


def cost_scaling(evidence: Evidence) -> CostScaling | None:
    """How the cost grows; None where no tokens are known."""
    averages = _averages(evidence)
    if averages is None:
        return None
    manifest = evidence.manifest
    teacher = manifest.teacher if manifest else evidence.teacher
    price = price_of(teacher) if teacher and not teacher.startswith("recorded:") else None
    if teacher and price is not None:
        models: tuple[PricedModel, ...] = (PricedModel(teacher.partition(":")[2], price),)
    else:
        listed = [PricedModel(name, price) for name, price in listed_prices().items()]
        models = tuple(sorted(listed, key=lambda m: m.cost(averages, 1_000_000), reverse=True))
    spent = None
    if manifest and manifest.cost_usd > 0:
        spent = Spent(manifest.answered, manifest.cost_usd, manifest.prices_dated)
    return CostScaling(teacher, price is not None, averages, models, spent)


def _averages(evidence: Evidence) -> TokenAverages | None:
    """The best count there is: the provider's, else the training rows', else the answers' shown here."""
    manifest = evidence.manifest
    if manifest and manifest.answered and manifest.usage.output_tokens:
        n = manifest.answered
        return TokenAverages(
            manifest.usage.input_tokens / n, manifest.usage.output_tokens / n, n, "counted by the provider"
        )
    splits = evidence.run.splits.values() if evidence.run else ()
    rows = sum(split.rows for split in splits)
    targets = sum(split.target_tokens for split in splits)
    if rows and targets:
        prompts = sum(split.tokens for split in splits) - targets
        return TokenAverages(prompts / rows, targets / rows, rows, "counted with the student's tokenizer")
    answers = [g for g in evidence.of("teacher") if g.output_tokens]
    if answers:
        mean = sum(g.output_tokens for g in answers) / len(answers)
        return TokenAverages(0.0, mean, len(answers), "shown in this comparison", has_input=False)
    return None
