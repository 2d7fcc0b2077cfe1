"""Records of how far judges agree with people, as `calibration.json` holds them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mlx_distill.records import Contender, Record


class ScoreAgreement(Record):
    """A judge's scores beside those of people, from 0 to 10, label by label.

    Attributes:
        n: Labels.
        pearson: Correlation of the scores; None where it is not defined, as with fewer than two or all the same.
        spearman: Correlation of their ranks.
        kappa: Cohen's, with quadratic weights, of the scores rounded to whole numbers.
        gap: Mean of judge − human: above 0 the judge is milder.
    """

    n: int = Field(ge=0)
    pearson: float | None = None
    spearman: float | None = None
    kappa: float | None = None
    gap: float | None = None


class PairAgreement(Record):
    """A judge's winners beside those of people; both orders of a pair taken together.

    Attributes:
        n: Labels.
        agreement: Share of them on which both say the same, ties included.
        kappa: Cohen's, unweighted, of first, second and tie.
    """

    n: int = Field(ge=0)
    agreement: float | None = None
    kappa: float | None = None


class JudgeCalibration(Record):
    """How far one judge agrees with people.

    Attributes:
        overall: Of overall scores.
        dimensions: By dimension id, those that were labelled.
        pairs: None where no pair was labelled.
    """

    judge: str
    overall: ScoreAgreement
    dimensions: dict[str, ScoreAgreement] = Field(default_factory=dict)
    pairs: PairAgreement | None = None


class Calibration(Record):
    """`calibration.json`: verdicts held against labels of people.

    Attributes:
        labels: Their file, as given.
        generations_sha256: Of the file of answers that the verdicts are on.
        rows: Labels in the file.
        unknown_prompts: Of labels whose prompt is not in the comparison; labels by prompt id.
        unknown_contenders: The same by contender, where the prompt is known.
        judges: In the order of their verdicts.
    """

    format: Literal[1] = 1
    labels: str
    labels_sha256: str
    generations_sha256: str
    rows: int
    unknown_prompts: dict[str, int] = Field(default_factory=dict)
    unknown_contenders: dict[Contender, int] = Field(default_factory=dict)
    judges: tuple[JudgeCalibration, ...]
