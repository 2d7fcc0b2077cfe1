"""How likely the students find held-out answers of the teacher, and how far they are from its distribution there.

Perplexity, the divergence from a teacher whose distribution is known, and what distillation changed of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
class Distances:
    """How far the students are from a teacher's distribution, on the rows that it and all of them read.

    Attributes:
        teacher: MODEL@REVISION.
        top_k: Of its words that were named at each position; all others are one more.
        contenders: KL(teacher‖contender), nats a token.
        changes: By contender, that − the base's; negative is nearer. The interval is over rows.
        elsewhere: Contenders that were measured against another teacher, and are left out.
    """

    teacher: str
    top_k: int | None
    rows: int
    tokens: int
    contenders: dict[str, float]
    changes: dict[str, Estimate]
    elsewhere: tuple[str, ...] = ()


@dataclass(frozen=True)
class Losses:
    """All contenders on the rows that all of them read.

    Attributes:
        changes: By contender, its nats a token − the base's; negative is better. The interval is over rows.
        distances: None where no teacher's distribution was known.
    """

    contenders: dict[str, Fluency]
    changes: dict[str, Estimate]
    distances: Distances | None = None


#: The rows of each contender, by the hash of their tokens.
_Read = dict[str, dict[str, HeldOutLoss]]


def losses_of(evidence: Evidence) -> Losses | None:
    """Perplexities on the same rows; None where no rows were read by all."""
    read: _Read = {}
    for row in (row for row in evidence.losses if math.isfinite(row.nll)):
        read.setdefault(row.contender, {})[row.row_sha256] = row
    read = {c: read[c] for c in evidence.contenders if c in read}
    order = _shared(read)
    if not order:
        return None
    nats, changes = _means(read, order, lambda row: row.nll)
    tokens = _tokens(read, order)
    fluency = {c: Fluency(len(order), tokens, mean) for c, mean in nats.items()}
    return Losses(fluency, changes, _distances(read))


def _distances(read: _Read) -> Distances | None:
    """The distances from one teacher: the student's, else that of the first who has one."""
    known = {c: {sha: row for sha, row in rows.items() if _apart(row) is not None} for c, rows in read.items()}
    known = {c: rows for c, rows in known.items() if rows}
    if not known:
        return None
    reference = next(iter((known.get("distilled") or next(iter(known.values()))).values()))
    measure = (reference.teacher, reference.top_k)
    same = {
        c: own
        for c, rows in known.items()
        if (own := {sha: row for sha, row in rows.items() if (row.teacher, row.top_k) == measure})
    }
    order = _shared(same)
    if not order or reference.teacher is None:
        return None
    nats, changes = _means(same, order, lambda row: _apart(row) or 0.0)
    return Distances(
        teacher=reference.teacher,
        top_k=reference.top_k,
        rows=len(order),
        tokens=_tokens(same, order),
        contenders=nats,
        changes=changes,
        elsewhere=tuple(c for c in known if c not in same),
    )


def _apart(row: HeldOutLoss) -> float | None:
    if row.divergence is None or row.teacher is None or not math.isfinite(row.divergence):
        return None
    return row.divergence


def _shared(read: _Read) -> list[str]:
    """Rows that all have read as the same tokens."""
    shared = set.intersection(*(set(rows) for rows in read.values())) if read else set()
    # Another tokenizer cuts an answer into other tokens: nats a token are then not to be compared.
    return sorted(sha for sha in shared if len({rows[sha].tokens for rows in read.values()}) == 1)


def _tokens(read: _Read, order: list[str]) -> int:
    first = next(iter(read.values()))
    return sum(first[sha].tokens for sha in order)


def _means(
    read: _Read, order: list[str], of: Callable[[HeldOutLoss], float]
) -> tuple[dict[str, float], dict[str, Estimate]]:
    """Nats a token by contender, and what each has more or less than the base.

    Args:
        of: A row's sum of nats.
    """
    tokens = _tokens(read, order)
    means = {c: sum(of(rows[sha]) for sha in order) / tokens for c, rows in read.items()}
    changes = {}
    for contender, rows in read.items():
        if contender == "base" or "base" not in read:
            continue
        differences = [(of(rows[sha]) - of(read["base"][sha]), rows[sha].tokens) for sha in order]
        if change := _change(differences, tokens):
            changes[contender] = change
    return means, changes


def _change(differences: list[tuple[float, int]], tokens: int) -> Estimate | None:
    """The difference a token: each row counts as often as it has tokens, and is drawn as a whole.

    Args:
        differences: Of each row in nats, and its tokens.
    """
    thin = max(1, math.ceil(tokens / _MOST_TOKENS))
    values: list[float] = []
    groups: list[int] = []
    for number, (difference, count) in enumerate(differences):
        times = max(1, round(count / thin))
        values += [difference / count] * times
        groups += [number] * times
    found = estimate(values, groups)
    exact = sum(difference for difference, _ in differences) / tokens
    return Estimate(exact, tokens, len(differences), found.interval) if found else None
