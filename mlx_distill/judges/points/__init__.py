"""The tables of the rubric: what in an answer brings how many points. `rubric.py` documents them."""

from __future__ import annotations

from collections.abc import Callable

from mlx_distill.judges.evidence import Evidence
from mlx_distill.judges.points.completeness import completeness_points
from mlx_distill.judges.points.jvm import jvm_points
from mlx_distill.judges.points.prose import explanation_points, wrong_language_points
from mlx_distill.judges.points.python import python_points
from mlx_distill.judges.points.sql import sql_points
from mlx_distill.judges.points.tally import Tallies, Tally

__all__ = ["Tallies", "Tally", "tallies"]

_BY_LANGUAGE: dict[str, Callable[[Evidence], Tallies]] = {
    "python": python_points,
    "sql": sql_points,
    "java": jvm_points,
    "kotlin": jvm_points,
}


def tallies(evidence: Evidence) -> Tallies:
    """The points of an answer in every dimension, before what holds for all of them."""
    asked, language = evidence.asked, evidence.language
    if not asked.code:
        found = explanation_points(evidence)
    elif language and (language == asked.language or not asked.language or _embeds_sql(evidence)):
        found = _BY_LANGUAGE[language](evidence)
    else:
        found = wrong_language_points(evidence)
    return {**found, "completeness": completeness_points(evidence)}


def _embeds_sql(evidence: Evidence) -> bool:
    """Whether SQL was asked for and came inside a program that runs it."""
    return evidence.asked.language == "sql" and evidence.language == "python" and "sqlite3" in evidence.source
