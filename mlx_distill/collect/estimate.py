"""What a collection would cost, before anything is sent: no key, no network.

Reads: a prompt file and, where there is one, the folder's ledger.  Writes: nothing.

Where the ledger has replies of the teacher, tokens in and out are reckoned from what these came to. Where it has
none, tokens in follow from the characters of the prompts, and an answer is taken to have `TYPICAL_ANSWER_TOKENS`. The
worst case is no estimate: it cannot be passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlx_distill.budget import worst_usage
from mlx_distill.collect.requests import limits, outstanding, samples_in
from mlx_distill.ledger import Ledger, Spending
from mlx_distill.pricing import PRICES_DATED, Price, price_of
from mlx_distill.records import Request, Usage

#: Characters of a prompt in English, or in code, that make a token.
CHARACTERS_PER_TOKEN = 3.5

#: Tokens of an answer where nothing was measured. The answers that ship with the package have about 900; a large
#: model asked the same prompts went past 1,024 practically every time.
TYPICAL_ANSWER_TOKENS = 1_500

#: Prompts that the scale table reckons with.
SCALE = (104, 10_000, 1_000_000, 16_000_000)


@dataclass(frozen=True)
class Measured:
    """Means of the replies that a ledger holds.

    Attributes:
        replies: How many the means are of.
        characters_per_token: Of what was sent.
        output_tokens: A whole answer, what was cut and asked again for it included.
    """

    replies: int
    characters_per_token: float
    output_tokens: float


@dataclass(frozen=True)
class ScaleRow:
    """What all samples of so many prompts would cost, in US dollars."""

    prompts: int
    online: float
    batch: float


@dataclass(frozen=True)
class Estimate:
    """What is still to be sent, and what it would cost in US dollars; None where the price is not known.

    Attributes:
        prompts: All prompts.
        samples: Answers to each.
        requests: How many of these are still to be sent.
        source: What tokens are reckoned from.
        replies: How many replies were measured.
        input_tokens: Expected, of all that is still to be sent.
        worst: If every answer used up every limit, up to the ceiling.
        spent: By this ledger so far, at most.
    """

    teacher: str
    prompts: int
    samples: int
    requests: int
    source: Literal["characters", "measured"]
    replies: int
    input_tokens: int
    output_tokens: int
    expected: float | None
    expected_batch: float | None
    worst: float | None
    worst_batch: float | None
    spent: float
    prices_dated: str
    scale: tuple[ScaleRow, ...]

    @property
    def asked(self) -> int:
        """All answers asked for, those that are there included."""
        return self.prompts * self.samples

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def measure(ledger: Ledger, teacher: str) -> Measured | None:
    """Means of a teacher's replies in a ledger; None where there is none that counts tokens.

    Args:
        teacher: As `Request.teacher` names it.
    """
    replies = answered = characters = input_tokens = output_tokens = 0
    for entry in ledger.sample(teacher):
        if entry.reply is None or not entry.reply.usage.input_tokens:
            continue
        replies += 1
        answered += entry.reply.stop != "length"
        characters += _characters(entry.request)
        input_tokens += entry.reply.usage.input_tokens
        output_tokens += entry.reply.usage.output_tokens
    if not replies:
        return None
    return Measured(replies, characters / input_tokens, output_tokens / max(1, answered))


def estimate(requests: Sequence[Request], *, teacher: str, ceiling: int, ledger: Ledger | None = None) -> Estimate:
    """Reckon what a collection would still cost.

    Args:
        requests: As `PromptRequests` has them.
        teacher: Its spec.
        ceiling: Highest token limit that a cut answer is asked again with.
        ledger: Of the folder, if there is one.
    """
    price = price_of(teacher)
    samples = samples_in(requests)
    measured = None
    todo: Iterable[Request] = requests
    spent = Spending(0.0, 0.0, 0.0, 0)
    if ledger is not None:
        measured = measure(ledger, requests[0].teacher) if requests else None
        todo = outstanding(ledger, requests, ceiling)
        spent = ledger.spending()
    per_token = measured.characters_per_token if measured else CHARACTERS_PER_TOKEN
    answer = measured.output_tokens if measured else min(TYPICAL_ANSWER_TOKENS, ceiling)
    count = characters = 0
    worst = Usage()
    for request in todo:
        count += 1
        characters += _characters(request)
        most = worst_usage(request)
        steps = limits(request.max_tokens, ceiling)
        worst = Usage(
            input_tokens=worst.input_tokens + most.input_tokens * len(steps),
            output_tokens=worst.output_tokens + sum(steps),
        )
    expected = Usage(input_tokens=round(characters / per_token), output_tokens=round(count * answer))
    return Estimate(
        teacher=teacher,
        prompts=len(requests) // samples,
        samples=samples,
        requests=count,
        source="measured" if measured else "characters",
        replies=measured.replies if measured else 0,
        input_tokens=expected.input_tokens,
        output_tokens=expected.output_tokens,
        expected=_cost(price, expected, batch=False),
        expected_batch=_cost(price, expected, batch=True),
        worst=_cost(price, worst, batch=False),
        worst_batch=_cost(price, worst, batch=True),
        spent=spent.most,
        prices_dated=PRICES_DATED,
        scale=_scale(price, samples, sum(map(_characters, requests)) / per_token / len(requests), answer),
    )


def _scale(price: Price | None, samples: int, input_tokens: float, output_tokens: float) -> tuple[ScaleRow, ...]:
    if price is None:
        return ()
    one = samples * (input_tokens * price.input + output_tokens * price.output) / 1e6
    return tuple(ScaleRow(prompts, prompts * one, prompts * one * price.batch_factor) for prompts in SCALE)


def _cost(price: Price | None, usage: Usage, *, batch: bool) -> float | None:
    return None if price is None else price.cost(usage, batch=batch)


def _characters(request: Request) -> int:
    return len(request.system or "") + sum(len(message.content or "") for message in request.messages)
