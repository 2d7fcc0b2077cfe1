"""Holds the verdicts of a comparison against labels of people. Asks nobody.

Reads: visuals/NAME/{generations.jsonl,verdicts.jsonl,duels.jsonl}, a file of labels.
Writes: visuals/NAME/calibration.json.

A label is a line of JSON: an answer's overall score, its scores by dimension, or both, or the better one of two:

    {"prompt_id": "merge-sort", "contender": "base", "score": 4.5}
    {"prompt_id": "merge-sort", "contender": "base", "scores": {"correctness": 3, "structure": 6}}
    {"prompt_id": "merge-sort", "first": "distilled", "second": "base", "winner": "first"}

Several labels of one answer, as from several people, count each. Scores of all dimensions have an overall one, too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_core import from_json

from mlx_distill.calibration import Calibration, JudgeCalibration, PairAgreement, ScoreAgreement
from mlx_distill.config import JudgeConfig
from mlx_distill.errors import InputError
from mlx_distill.judges.base import DIMENSIONS
from mlx_distill.judges.run import latest_generations
from mlx_distill.layout import ComparisonFolder, explain, file_sha256, lock, read_rows, write_text
from mlx_distill.records import CONTENDER_PATTERN, Contender, Record, Verdict
from mlx_distill.scores import Duel
from mlx_distill.stats import cohen_kappa, pearson, spearman
from mlx_distill.verdicts import Winner, fitting_duels, fitting_verdicts, settled

_Score = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False, strict=True)]
_PromptId = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
_Name = Annotated[str, Field(pattern=CONTENDER_PATTERN)]

_ROWS = (
    'A row is {"prompt_id": …, "contender": …, "score": 0-10}, the same with "scores": {dimension: 0-10}, or '
    '{"prompt_id": …, "first": …, "second": …, "winner": "first", "second" or "tie"}.'
)


class ScoreLabel(Record):
    """What somebody gave an answer."""

    prompt_id: _PromptId
    contender: _Name
    score: _Score | None = None
    scores: dict[str, _Score] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.score is None and not self.scores:
            raise ValueError("neither score nor scores is given")
        if unknown := [name for name in self.scores if name not in DIMENSIONS]:
            raise ValueError(f"no such dimension: {unknown[0]!r}; there are {', '.join(DIMENSIONS)}")
        return self

    @property
    def overall(self) -> float | None:
        """The overall score, or the mean over all dimensions."""
        if self.score is None and len(self.scores) == len(DIMENSIONS):
            return sum(self.scores.values()) / len(self.scores)
        return self.score


class PairLabel(Record):
    """Which of two answers somebody prefers."""

    prompt_id: _PromptId
    first: _Name
    second: _Name
    winner: Winner

    @model_validator(mode="after")
    def _of_two(self) -> Self:
        if self.first == self.second:
            raise ValueError("first and second are the same contender")
        return self


Label = ScoreLabel | PairLabel


def calibrate(config: JudgeConfig) -> Calibration:
    """Hold every judge's verdicts on the present answers against the labels that the settings name.

    Raises:
        InputError: The labels cannot be read, none is on a judged answer, or the comparison cannot be read.
        FolderError: Another process uses the folder.
    """
    assert config.calibrate is not None
    labels = read_labels(config.calibrate)
    folder = ComparisonFolder(config.comparison)
    if not folder.generations.exists():
        raise InputError("there are no answers.", path=folder.generations, hint="Run  mlx-distill compare  first.")
    with lock(folder.root):
        answers = {(one.prompt.id, one.contender): one for one in latest_generations(folder)}
        verdicts, _ = fitting_verdicts(read_rows(folder.verdicts, Verdict), answers)
        duels, _ = fitting_duels(read_rows(folder.duels, Duel), answers)
        prompts, contenders = {prompt for prompt, _ in answers}, {contender for _, contender in answers}
        judges = dict.fromkeys([*(row.judge for row in verdicts), *(row.judge for row in duels)])
        found = [
            _of_judge(name, [v for v in verdicts if v.judge == name], [d for d in duels if d.judge == name], labels)
            for name in judges
        ]
        unknown_prompts = Counter(label.prompt_id for label in labels if label.prompt_id not in prompts)
        unknown_contenders = Counter(
            name
            for label in labels
            if label.prompt_id in prompts
            for name in _contenders_of(label)
            if name not in contenders
        )
        if not any(_labels_met(one) for one in found):
            raise _no_overlap(config, labels, judges, unknown_prompts, unknown_contenders)
        record = Calibration(
            labels=str(config.calibrate),
            labels_sha256=file_sha256(config.calibrate),
            generations_sha256=file_sha256(folder.generations),
            rows=len(labels),
            unknown_prompts=dict(unknown_prompts),
            unknown_contenders=dict(unknown_contenders),
            judges=tuple(found),
        )
        write_text(folder.calibration, record.model_dump_json(indent=2, exclude_none=True) + "\n")
    return record


def read_labels(path: Path) -> list[Label]:
    """The labels of a file.

    Raises:
        InputError: It is missing, empty or not text, or a line is not a label; says which line and why.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError("no such file.", path=path, hint=_ROWS) from None
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: {error.reason} at byte {error.start}.", path=path) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}.", path=path) from None
    # By line feeds alone: other signs that `splitlines` goes by may stand in a text.
    labels = [_label(line, path, number) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not labels:
        raise InputError("holds no labels.", path=path, hint=_ROWS)
    return labels


def _label(line: str, path: Path, number: int) -> Label:
    try:
        row = from_json(line)
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}.", path=path, line=number, hint=_ROWS) from None
    if not isinstance(row, dict):
        raise InputError("not a JSON object.", path=path, line=number, hint=_ROWS)
    try:
        if "winner" in row or "first" in row:
            return PairLabel.model_validate(row)
        return ScoreLabel.model_validate(row)
    except ValidationError as error:
        raise InputError(f"{explain(error)}.", path=path, line=number, hint=_ROWS) from None


def _of_judge(
    name: str, verdicts: Sequence[Verdict], duels: Sequence[Duel], labels: Sequence[Label]
) -> JudgeCalibration:
    by_answer = {(row.prompt_id, row.contender): row for row in verdicts}
    scored = [
        (label, found)
        for label in labels
        if isinstance(label, ScoreLabel) and (found := by_answer.get((label.prompt_id, label.contender))) is not None
    ]
    dimensions = {
        dimension: [
            (found.scores[dimension].score, label.scores[dimension])
            for label, found in scored
            if dimension in label.scores and dimension in found.scores
        ]
        for dimension in DIMENSIONS
    }
    overall = [
        (found.overall, label.overall)
        for label, found in scored
        if found.overall is not None and label.overall is not None
    ]
    pairs = [label for label in labels if isinstance(label, PairLabel)]
    return JudgeCalibration(
        judge=name,
        overall=score_agreement(overall),
        dimensions={dimension: score_agreement(rows) for dimension, rows in dimensions.items() if rows},
        pairs=_pairs(pairs, duels) if pairs else None,
    )


def score_agreement(rows: Sequence[tuple[float, float]]) -> ScoreAgreement:
    """How a judge's scores agree with those of people.

    Args:
        rows: Judge's and human score, a label each.
    """
    if not rows:
        return ScoreAgreement(n=0)
    ours, theirs = [row[0] for row in rows], [row[1] for row in rows]
    return ScoreAgreement(
        n=len(rows),
        pearson=pearson(ours, theirs),
        spearman=spearman(ours, theirs),
        kappa=cohen_kappa([_whole(x) for x in ours], [_whole(x) for x in theirs], weights="quadratic"),
        gap=sum(ours) / len(rows) - sum(theirs) / len(rows),
    )


def _whole(score: float) -> int:
    """Rounded, halves up: Python's own rounding of halves goes to the even one."""
    return math.floor(score + 0.5)


def _pairs(labels: Sequence[PairLabel], duels: Iterable[Duel]) -> PairAgreement:
    rows = list(duels)
    by_pair = {
        pair: {one.prompt_id: one.winner for one in settled(rows, *pair)}
        for pair in {(label.first, label.second) for label in labels}
    }
    said = [(by_pair[label.first, label.second].get(label.prompt_id), label.winner) for label in labels]
    both = [(ours, theirs) for ours, theirs in said if ours is not None]
    if not both:
        return PairAgreement(n=0)
    return PairAgreement(
        n=len(both),
        agreement=sum(ours == theirs for ours, theirs in both) / len(both),
        kappa=cohen_kappa([ours for ours, _ in both], [theirs for _, theirs in both]),
    )


def _contenders_of(label: Label) -> tuple[Contender, ...]:
    return (label.contender,) if isinstance(label, ScoreLabel) else (label.first, label.second)


def _labels_met(found: JudgeCalibration) -> int:
    return found.overall.n + sum(one.n for one in found.dimensions.values()) + (found.pairs.n if found.pairs else 0)


def _no_overlap(
    config: JudgeConfig,
    labels: Sequence[Label],
    judges: Iterable[str],
    unknown_prompts: Mapping[str, int],
    unknown_contenders: Mapping[str, int],
) -> InputError:
    command = f"mlx-distill judge {config.comparison} --judge SPEC"
    if not list(judges):
        return InputError("nothing is judged yet.", path=config.comparison, hint=f"Judge first:  {command}")
    why = [
        f"unknown {kind}: {', '.join(list(found)[:5])}{' and more' if len(found) > 5 else ''}"
        for kind, found in (("prompts", unknown_prompts), ("contenders", unknown_contenders))
        if found
    ]
    pairs = any(isinstance(label, PairLabel) for label in labels)
    unknown = f" ({'; '.join(why)})" if why else ""
    return InputError(
        f"none of the {len(labels)} labels is on what was judged{unknown}.",
        path=config.calibrate,
        hint=f"Pairs are judged by  {command} --pairwise" if pairs and not why else _ROWS,
    )
