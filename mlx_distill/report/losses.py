"""How likely the students find held-out answers of the teacher: perplexity, and what distillation changed of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlx_distill.report.evidence import Evidence
from mlx_distill.report.intervals import Estimate, estimate
from mlx_distill.scores import HeldOutLoss

#: Tokens that the bootstrap of a difference looks at, at most; of more, each stands for several.
_MOST_TOKENS = 1_000_000


@dataclass(frozen=True)
class Fluency:
    """One contender on the held-out answers.

    Attributes:
        nats: Negative log-likelihood a token.
    """

    rows: int
    tokens: int
    nats: float

    @property
    def perplexity(self) -> float:
        """Its exponential; infinite where that is beyond all numbers."""
        return math.exp(self.nats) if self.nats < 700 else math.inf


@dataclass(frozen=True)
class Losses:
    """All contenders on the rows that all of them read.

    Attributes:
        changes: By contender, its nats a token − the base's; negative is better. The interval is over rows.
    """

    contenders: dict[str, Fluency]
    changes: dict[str, Estimate]


def losses_of(evidence: Evidence) -> Losses | None:
    """Perplexities on the same rows; None where no rows were read by all."""
    by_contender: dict[str, dict[str, HeldOutLoss]] = {}
    for row in (row for row in evidence.losses if math.isfinite(row.nll)):
        by_contender.setdefault(row.contender, {})[row.row_sha256] = row
    if not by_contender:
        return None
    present = [c for c in evidence.contenders if c in by_contender]
    shared = set.intersection(*(set(rows) for rows in by_contender.values()))
    # Another tokenizer cuts an answer into other tokens: nats a token are then not to be compared.
    order = sorted(row for row in shared if len({by_contender[c][row].tokens for c in present}) == 1)
    if not order:
        return None
    tokens = sum(by_contender[present[0]][row].tokens for row in order)
    nats = {c: sum(by_contender[c][row].nll for row in order) / tokens for c in present}
    changes = {}
    for contender in present:
        if contender == "base" or "base" not in present:
            continue
        pairs = [(by_contender[contender][row], by_contender["base"][row]) for row in order]
        if change := _change(pairs, tokens):
            changes[contender] = change
    return Losses({c: Fluency(len(order), tokens, nats[c]) for c in present}, changes)


def _change(pairs: list[tuple[HeldOutLoss, HeldOutLoss]], tokens: int) -> Estimate | None:
    """The difference a token: each row counts as often as it has tokens, and is drawn as a whole."""
    thin = max(1, math.ceil(tokens / _MOST_TOKENS))
    values: list[float] = []
    groups: list[int] = []
    for number, (own, base) in enumerate(pairs):
        times = max(1, round(own.tokens / thin))
        values += [(own.nll - base.nll) / own.tokens] * times
        groups += [number] * times
    found = estimate(values, groups)
    exact = sum(own.nll - base.nll for own, base in pairs) / tokens
    return Estimate(exact, tokens, len(pairs), found.interval) if found else None
