"""The points of SQL, which ran on an empty in-memory SQLite database."""

from __future__ import annotations

import re

from mlx_distill.judges.evidence import Evidence
from mlx_distill.judges.points.tally import Tallies, Tally, distinct, failures_named, laid_out, text_around

_CLAUSE = (
    r"^\s*(?:SELECT|FROM|WHERE|GROUP BY|ORDER BY|JOIN|LEFT JOIN|VALUES|WITH|ON CONFLICT|CREATE|INSERT|UPDATE|DELETE)\b"
)


def sql_points(evidence: Evidence) -> Tallies:
    """All dimensions but completeness."""
    code, execution = evidence.source, evidence.execution
    correctness = Tally()
    correctness.add(1, "has SQL code")
    statement = re.search(r"\b(?:SELECT|WITH|CREATE|INSERT|UPDATE|DELETE)\b", code, re.IGNORECASE)
    correctness.have(1, statement is not None, "statement known")
    if execution is not None and execution.passed:
        correctness.add(5, "runs on SQLite")
        correctness.have(1.5, re.search(r"\bINSERT\s+INTO\b", code, re.IGNORECASE) is not None, "rows of its own")
        correctness.have(1.5, bool(execution.stdout), "rows returned")
    elif execution is not None and "no such table" in execution.stderr and "CREATE TABLE" not in code.upper():
        correctness.add(2, "could not be run, it brings no schema")
    elif execution is not None:
        correctness.add(0, f"does not run on SQLite: {execution.problem}")
    errors = Tally()
    errors.add(2, "has SQL code")
    rules = distinct(
        r"NOT\s+NULL|CHECK|PRIMARY\s+KEY|UNIQUE|REFERENCES|FOREIGN\s+KEY|ON\s+CONFLICT|RAISE|CONSTRAINT", code
    )
    errors.up_to(3, len(rules) / 2, f"{len(rules)} kinds of constraint")
    nulls = distinct(
        r"COALESCE|IS\s+(?:NOT\s+)?NULL|NULLIF|IFNULL|NOT\s+EXISTS|LEFT\s+JOIN|CASE|\bNULL\b|FILTER|UNION", code
    )
    errors.up_to(2, len(nulls) / 2, f"{len(nulls)} ways to treat missing values")
    failures_named(errors, evidence, 3)
    documentation = Tally()
    comments = len(re.findall(r"--\s*\w|/\*", code))
    documentation.up_to(2, comments / 2, f"{comments} comments")
    documentation.up_to(3, evidence.words / 80, f"{evidence.words} words on the statement")
    documentation.up_to(1, evidence.sentences / 4, f"{evidence.sentences} sentences")
    text_around(documentation, evidence)
    return {
        "correctness": correctness,
        "error_handling": errors,
        "documentation": documentation,
        "structure": laid_out(code, keywords=_CLAUSE),
    }
