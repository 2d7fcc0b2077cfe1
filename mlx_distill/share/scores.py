"""What judges made of a comparison: means with intervals, one scorecard a judge.

Reads: visuals/NAME/{generations.jsonl,verdicts.jsonl,comparison.json}.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlx_distill import layout
from mlx_distill.records import CONTENDERS, ComparisonRecord, Contender, Generation, Verdict
from mlx_distill.stats import Interval, bootstrap_interval
from mlx_distill.verdicts import first_answers, fitting_verdicts


@dataclass(frozen=True)
class Score:
    """A mean of overall scores, 0 to 10.

    Attributes:
        n: Answers.
        interval: 95 %, whole families of prompts drawn; None where all are of one family.
    """

    mean: float
    n: int
    interval: Interval | None


@dataclass(frozen=True)
class Scorecard:
    """One judge's scores.

    Attributes:
        judge: "rubric", or the spec of a model.
        gain: Distilled − base over the prompts that both were scored on; None where there is none.
        families: Of the prompts that the distilled student was scored on.
        unread: Verdicts that could not be read: missing, never taken for 0.
    """

    judge: str
    scores: Mapping[Contender, Score]
    gain: Score | None
    families: int
    unread: int


@dataclass(frozen=True)
class Scores:
    """A comparison as a card shows it.

    Attributes:
        prompts: That were answered.
        cut: Answers that the token budget ended, by contender.
    """

    record: ComparisonRecord | None
    prompts: int
    cards: tuple[Scorecard, ...]
    cut: Mapping[Contender, int] = field(default_factory=dict)


def judges_adapter(root: Path, sha256: str) -> bool:
    """Whether the distilled answers of a comparison are of this very adapter, and not of one trained since or before.

    Args:
        sha256: Of `adapters.safetensors`.

    Raises:
        InputError: A file of it is not what it claims to be.
    """
    rows = layout.read_rows(layout.ComparisonFolder(root).generations, Generation)
    # `compare` names the student by its run and the beginning of its adapter's hash.
    return all(row.model.endswith(f"@{sha256[:12]}") for row in rows if row.contender == "distilled")


def read_scores(root: Path) -> Scores | None:
    """The scores of a comparison; None where there is none.

    Raises:
        InputError: A file of it is not what it claims to be.
    """
    folder = layout.ComparisonFolder(root)
    answers = first_answers(layout.read_rows(folder.generations, Generation))
    if not answers:
        return None
    record = layout.read_record(folder.record, ComparisonRecord) if folder.record.exists() else None
    verdicts, _ = fitting_verdicts(layout.read_rows(folder.verdicts, Verdict), answers)
    judges = sorted(dict.fromkeys(v.judge for v in verdicts), key=lambda judge: judge == "rubric")
    families = {g.prompt.id: g.prompt.family for g in answers.values()}
    cards = (_scorecard(j, [v for v in verdicts if v.judge == j], families) for j in judges)
    cut = {c: sum(g.contender == c and g.stop == "length" for g in answers.values()) for c in CONTENDERS}
    return Scores(record, len(families), tuple(card for card in cards if card.scores), cut)


def _scorecard(judge: str, verdicts: list[Verdict], families: Mapping[str, str]) -> Scorecard:
    overall = {(v.contender, v.prompt_id): v.overall for v in verdicts}
    known = {
        contender: {prompt: value for (who, prompt), value in overall.items() if who == contender and value is not None}
        for contender in CONTENDERS
    }
    both = {p: value - known["base"][p] for p, value in known["distilled"].items() if p in known["base"]}
    return Scorecard(
        judge=judge,
        scores={contender: _score(values, families) for contender, values in known.items() if values},
        gain=_score(both, families) if both else None,
        families=len({families[prompt] for prompt in known["distilled"]}),
        unread=sum(value is None for value in overall.values()),
    )


def _score(values: Mapping[str, float], families: Mapping[str, str]) -> Score:
    interval = bootstrap_interval(list(values.values()), groups=[families[prompt] for prompt in values])
    return Score(sum(values.values()) / len(values), len(values), interval)
