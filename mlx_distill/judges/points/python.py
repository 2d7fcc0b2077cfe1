"""The points of Python."""

from __future__ import annotations

from mlx_distill.judges.evidence import Evidence
from mlx_distill.judges.points.tally import Tallies, Tally, failures_named, text_around
from mlx_distill.judges.python_code import Function, PythonCode

_KNOWN = """
    numpy pandas pytest requests scipy matplotlib sklearn torch tensorflow flask django fastapi sqlalchemy pydantic
    aiohttp httpx redis psycopg2 hypothesis sortedcontainers attrs attr yaml dateutil networkx
"""
#: Packages that honest answers import. What an answer imports beyond these and the standard library is its mistake.
_KNOWN_PACKAGES = frozenset(_KNOWN.split())


def python_points(evidence: Evidence) -> Tallies:
    """All dimensions but completeness."""
    code = evidence.python
    if code is None:
        broken = {name: Tally() for name in ("error_handling", "documentation", "structure")}
        for tally in broken.values():
            tally.lacks("Python that can be read")
        text_around(broken["documentation"], evidence)
        return {**broken, "correctness": _correctness(evidence)}
    return {
        "correctness": _correctness(evidence),
        "error_handling": _errors(code, evidence),
        "documentation": _documentation(code, evidence),
        "structure": _structure(code),
    }


def _correctness(evidence: Evidence) -> Tally:
    tally, code, execution = Tally(), evidence.python, evidence.execution
    tally.add(1, "has Python code")
    if code is None or not code.whole:
        tally.add(0, "it does not parse")
        return tally
    tally.add(2, "parses")
    if execution is None:
        return tally
    if execution.passed and not hollow(code):
        tally.add(3, "runs to its end")
        checks = max(code.checks, execution.tests_run)
        tally.up_to(4, (checks + 1) / 4 if checks else 0, f"{checks} checks of its own pass")
    elif execution.passed:
        tally.add(0, "runs, but functions have no body")
    elif execution.missing_module and execution.missing_module.partition(".")[0] in _KNOWN_PACKAGES:
        tally.add(1.5, f"could not be run here, it needs {execution.missing_module}")
    else:
        tally.add(0, f"does not run to its end: {execution.problem}")
        if execution.tests_run:
            passed = execution.tests_run - execution.tests_failed
            tally.up_to(1.5, passed / execution.tests_run, f"{passed} of {execution.tests_run} tests pass")
    return tally


def hollow(code: PythonCode) -> list[str]:
    """Functions that stand in for code to be written."""
    return [function.name for function in code.functions if function.placeholder]


def _errors(code: PythonCode, evidence: Evidence) -> Tally:
    tally = Tally()
    tally.add(2, "parses")
    tally.have(2, code.raises > 0, "named exception raised")
    if code.raises > 1:
        tally.add(1, f"{code.raises} of them")
    tally.have(0.5, code.messages > 0, "message in an exception")
    tally.have(1, code.guards > 0, "early exit on odd input")
    if code.handlers > code.bare_handlers + code.broad_handlers:
        tally.add(1, "handles named exceptions")
    if code.custom_exceptions:
        tally.add(0.5, "has exception classes of its own")
    if code.cleanups:
        tally.add(1, "cleans up with `with` or `finally`")
    if code.error_checks:
        tally.add(1, "checks that errors are raised")
    failures_named(tally, evidence, 1.5)
    for points, count, what in (
        (-2, code.bare_handlers, "bare `except`"),
        (-2, code.silent_handlers, "silenced exception"),
        (-1, code.broad_handlers, "`except Exception`"),
        (-1, code.generic_raises, "`raise Exception`"),
    ):
        if count:
            tally.add(points * count, f"{count} x {what}")
    return tally


def _documentation(code: PythonCode, evidence: Evidence) -> Tally:
    tally = Tally()
    public = [function for function in code.functions if function.public and function.name != "main"]
    documented = sum(function.documented for function in public) + code.documented_classes + code.module_docstring
    wanted = len(public) + code.classes
    if wanted:
        tally.up_to(3, 1.25 * documented / wanted, f"{documented} docstrings for {wanted} public functions and classes")
    else:
        tally.lacks("public function or class to document")
    own = [function for function in code.functions if not function.is_test]
    if own:
        typed = sum(function.annotated for function in own) / len(own)
        tally.up_to(2, typed, f"{typed:.0%} of parameters and results typed")
    tally.have(1, code.comments > 0, "comment")
    text_around(tally, evidence)
    return tally


def _structure(code: PythonCode) -> Tally:
    tally = Tally()
    own: list[Function] = [f for f in code.functions if not f.is_test and not f.placeholder]
    tally.have(3, bool(own), "function with a body")
    if not own:
        return tally
    longest, deepest = max(f.lines for f in own), max(f.depth for f in own)
    tally.up_to(2, (120 - longest) / 60, f"longest function {longest} lines")
    tally.up_to(1.5, (6 - deepest) / 3, f"nested {deepest} deep")
    wrong = ", ".join(code.badly_named[:3])
    tally.add(0 if wrong else 1, f"names against convention: {wrong}" if wrong else "names by convention")
    tally.up_to(1, (0.35 - code.repeated_lines) / 0.25, f"{code.repeated_lines:.0%} of long lines repeated")
    tally.add(0 if code.global_statements else 0.5, "uses `global`" if code.global_statements else "no `global`")
    apart = any(function.is_test for function in code.functions) or code.main_guard
    tally.have(1, apart, "checks apart from the code")
    return tally
