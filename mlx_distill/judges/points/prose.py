"""The points of explanations, and of answers without the code that was asked for."""

from __future__ import annotations

import re

from mlx_distill.judges.evidence import Evidence
from mlx_distill.judges.points.tally import Tallies, Tally, failures_named, text_around


def explanation_points(evidence: Evidence) -> Tallies:
    """All dimensions but completeness."""
    execution, blocks = evidence.execution, evidence.blocks
    correctness = Tally()
    correctness.up_to(4, evidence.coverage / 0.5, f"names {evidence.coverage:.0%} of what was asked about")
    correctness.up_to(2, evidence.words / 100, f"{evidence.words} words; whether they are true is not judged")
    if execution is not None and execution.passed:
        correctness.add(3, "its code runs to its end")
        if evidence.python is not None and evidence.python.checks:
            correctness.add(1, "with checks of its own")
    elif execution is not None:
        correctness.add(0, f"its code does not run to its end: {execution.problem}")
    else:
        correctness.add(1.5, "no code that could be run")
    errors = Tally()
    failures_named(errors, evidence, 6)
    errors.up_to(2, evidence.words / 100, f"{evidence.words} words")
    if evidence.python is not None:
        errors.up_to(
            2, (evidence.python.raises + evidence.python.guards + evidence.python.cleanups) / 2, "errors in its code"
        )
    else:
        errors.have(1, bool(blocks), "example")
    documentation = Tally()
    documentation.up_to(5, evidence.words / 110, f"{evidence.words} words")
    documentation.up_to(2, evidence.sentences / 6, f"{evidence.sentences} sentences")
    documentation.have(2, bool(blocks), "example")
    documentation.have(1, evidence.shape > 0 or "**" in evidence.prose, "headings, lists or tables")
    structure = Tally()
    paragraphs = len([part for part in re.split(r"\n\s*\n", evidence.prose) if len(part.split()) > 4])
    structure.up_to(4, paragraphs / 3, f"{paragraphs} paragraphs")
    structure.up_to(2, evidence.sentences / 6, f"{evidence.sentences} sentences")
    structure.up_to(2, evidence.shape / 3 + ("**" in evidence.prose), f"{evidence.shape} headings, list items and rows")
    structure.have(2, bool(blocks), "example apart from the text")
    return {
        "correctness": correctness,
        "error_handling": errors,
        "documentation": documentation,
        "structure": structure,
    }


def wrong_language_points(evidence: Evidence) -> Tallies:
    """Code was asked for, and there is none in a language that can be judged, or in another than was asked for."""
    wanted = (evidence.asked.language or "any known language").capitalize()
    documentation = Tally()
    text_around(documentation, evidence)
    others = {name: Tally() for name in ("correctness", "error_handling", "structure")}
    for tally in others.values():
        tally.lacks(f"code in {wanted}")
        if evidence.blocks:
            tally.add(1, "code in a language that was not asked for or is not known")
    return {**others, "documentation": documentation}
