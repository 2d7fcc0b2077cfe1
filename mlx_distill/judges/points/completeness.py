"""The points of completeness, for all answers."""

from __future__ import annotations

import re

from mlx_distill.judges.evidence import Evidence
from mlx_distill.judges.points.jvm import CHECK
from mlx_distill.judges.points.python import hollow
from mlx_distill.judges.points.tally import FAILURES, Tally

_BIG_O = re.compile(r"\bO\([^)\n]+\)")
_SPACE = re.compile(r"\b(?:space|memory)\b", re.IGNORECASE)
_ALTERNATIVE = re.compile(r"\balternativ|\binstead\b", re.IGNORECASE)


def completeness_points(evidence: Evidence) -> Tally:
    """Whether the answer is whole, and does all that was asked for."""
    tally, code_wanted = Tally(), evidence.asked.code
    tally.add(4 if evidence.finished else 0, "ended by itself" if evidence.finished else "cut by the token budget")
    if evidence.blocks:
        tally.have(1, evidence.fences_closed, "closing fence")
    elif not code_wanted:
        tally.add(1, "no fence left open")
    tally.have(1, evidence.ends_well, "whole last sentence or block")
    tally.up_to(1.5, evidence.coverage / 0.5, f"names {evidence.coverage:.0%} of what was asked about")
    if code_wanted:
        tally.have(1, bool(evidence.source.strip()) and evidence.words >= 15, "code together with text")
    else:
        tally.up_to(1, evidence.words / 100, f"{evidence.words} words")
    parts = _parts(evidence)
    done = [name for name, there in parts.items() if there]
    missing = [name for name, there in parts.items() if not there]
    if parts:
        tally.up_to(
            1.5, len(done) / len(parts), f"has {', '.join(done)}" if done else "none of the parts that belong to it"
        )
    else:
        tally.add(1.5, "no further part was asked for")
    if missing:
        tally.lacks(" or ".join(missing))
    if evidence.placeholders:
        tally.add(-2.0 * min(2, len(evidence.placeholders)), f"left out: {', '.join(evidence.placeholders[:3])[:80]}")
    if evidence.python is not None and (empty := hollow(evidence.python)):
        tally.add(-2.0 * min(2, len(empty)), f"without a body: {', '.join(empty[:3])[:80]}")
    return tally


def _parts(evidence: Evidence) -> dict[str, bool]:
    """What the prompt asks for beside the code itself, and whether it is there."""
    asked, python = evidence.asked, evidence.python
    checks = python.checks if python else len(CHECK.findall(evidence.source))
    tests = sum(function.is_test for function in python.functions) if python else checks
    parts: dict[str, bool] = {}
    if asked.code:
        parts["a check or query"] = checks > 0 or (evidence.language == "sql" and "select" in evidence.source.lower())
    if asked.tests:
        parts["tests"] = tests > 0 or checks > 2 or "select" in evidence.source.lower()
    if asked.complexity:
        parts["a complexity"] = _BIG_O.search(evidence.prose) is not None and bool(_SPACE.search(evidence.prose))
    if asked.alternative:
        parts["an alternative"] = len(evidence.blocks) > 1 or bool(_ALTERNATIVE.search(evidence.text))
    if asked.robust:
        parts["errors"] = python.raises > 0 if python else bool(FAILURES.search(evidence.text))
    return parts
