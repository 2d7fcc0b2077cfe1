"""The points of Java and Kotlin, which are read, not compiled or run."""

from __future__ import annotations

import re

from mlx_distill.judges.evidence import Evidence
from mlx_distill.judges.points.tally import Tallies, Tally, failures_named, laid_out, text_around

#: A line that can find the program wrong.
CHECK = re.compile(r"\bassert\w*\b|\bcheck\s*\(|AssertionError|@Test\b|IllegalStateException|\brequire\s*\(")
_NAMED_ERROR = re.compile(
    r"\bthrow (?:new )?(?!(?:Exception|Throwable)\b)\w+|\b(?:require|check|requireNonNull|error)\w*\s*[({]"
)
_STRING = re.compile(r'"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\'|//[^\n]*|--[^\n]*|/\*.*?\*/', re.DOTALL)


def jvm_points(evidence: Evidence) -> Tallies:
    """All dimensions but completeness."""
    code, name = evidence.source, evidence.language.capitalize()
    bare = _STRING.sub("", code)
    correctness = Tally()
    correctness.add(1, f"has {name} code, which was not compiled or run")
    correctness.have(
        3,
        bool(bare.strip()) and all(bare.count(a) == bare.count(b) for a, b in ("()", "[]", "{}")),
        "balanced brackets",
    )
    correctness.have(2, bool(re.search(r"\b(?:class|record|interface|fun)\s+\w+", bare)), "declaration")
    correctness.have(1.5, bool(CHECK.search(bare)), "check of its own")
    errors = Tally()
    errors.add(2, f"has {name} code")
    named = len(_NAMED_ERROR.findall(bare))
    errors.up_to(4, named / 2, f"{named} named exceptions or preconditions")
    guards = len(re.findall(r"\bif\s*\(|\?:|\?\.|\belse\b|\bwhen\b|Optional|\bsealed\b|\bfinal\b", bare))
    errors.up_to(2, guards / 3, f"{guards} cases told apart")
    failures_named(errors, evidence, 2)
    if generic := len(re.findall(r"catch\s*\(\s*(?:\w+\s*:\s*)?(?:Exception|Throwable)\b", bare)):
        errors.add(-1.0 * generic, f"{generic} x catches everything")
    documentation = Tally()
    comments = len(re.findall(r"//\s*\w|/\*\*?", code))
    documentation.up_to(3, comments / 3, f"{comments} comments")
    documentation.add(1, "typed by the language")
    documentation.up_to(2, evidence.sentences / 4, f"{evidence.sentences} sentences")
    text_around(documentation, evidence)
    structure = laid_out(
        code,
        keywords=r"^\s*(?:public|private|final|static|class|record|fun|val|var|sealed|data|return|if|for|enum|import)\b",
    )
    return {
        "correctness": correctness,
        "error_handling": errors,
        "documentation": documentation,
        "structure": structure,
    }
