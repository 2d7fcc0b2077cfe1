"""The tests of a Python task: read from source, sent out without what they expect, and compared with what came back.

A test is an `assert` at the top level of a task's tests; other statements between them are carried out in order. Of
`assert f(3) == [1, 2]` the child process is given `f(3)` alone. A comparison with `==` or `is`, one side of which is a
literal, is split like this, and so is `not`; any other condition is seen as true or false. A loop or another statement
with asserts inside is a test that runs in the child process as it is, and passes if it raises nothing.
`raises(ValueError, f, -1)` is there to test for an exception.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic_core import from_json

from mlx_distill.evaluation import harness


@dataclass(frozen=True)
class Step:
    """One statement of the tests.

    Attributes:
        kind: "see" for an expression whose value is a test, "try" for a statement that is one, "do" for any other.
        source: The expression or statement.
        expected: The value, as `harness.encode` writes it.
        shown: The value, for people.
    """

    kind: Literal["see", "try", "do"]
    source: str
    expected: str = ""
    shown: str = ""

    @property
    def is_test(self) -> bool:
        """Whether it counts."""
        return self.kind != "do"


def read_steps(source: str) -> list[Step]:
    """Split the tests of a task.

    Raises:
        SyntaxError: It is not Python.
    """
    return steps_of(ast.parse(source).body)


def steps_of(statements: Sequence[ast.stmt]) -> list[Step]:
    """The steps that statements make; asserting a constant makes none."""
    steps = []
    for node in statements:
        if not isinstance(node, ast.Assert):
            steps.append(Step("try" if _checks(node) else "do", ast.unparse(node), harness.encode(None)))
        elif not isinstance(node.test, ast.Constant):
            steps.append(_test(node.test))
    return steps


def _checks(node: ast.stmt) -> bool:
    """Whether a statement asserts something when it is carried out; defining a function that would does not."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return False
    return any(isinstance(inner, ast.Assert) for inner in ast.walk(node))


def _test(test: ast.expr) -> Step:
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq | ast.Is):
        sides = (test.left, test.comparators[0])
        for seen, literal in (sides, sides[::-1]):
            try:
                expected = ast.literal_eval(literal)
            except (ValueError, TypeError):
                continue
            return Step("see", ast.unparse(seen), harness.encode(expected), ast.unparse(literal))
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return Step("see", f"bool({ast.unparse(test.operand)})", harness.encode(False), "False")
    return Step("see", f"bool({ast.unparse(test)})", harness.encode(True), "True")


@cache
def _harness() -> str:
    return Path(harness.__file__).read_text(encoding="utf-8")


def program(
    blocks: Sequence[str],
    *,
    fenced: bool = True,
    setup: str,
    names: Sequence[str],
    steps: Sequence[Step],
    mark: str,
) -> str:
    """The Python program that runs an answer and its tests, for `execution.run_python`; ASCII, whatever the answer.

    Args:
        blocks: The answer's code.
        fenced: Whether it was marked as code. If not, it is run only where it defines all of `names`.
        setup: Code before it.
        names: What it has to define.
        mark: What begins each line of the report.
    """
    job = {
        "mark": mark,
        "setup": setup,
        "blocks": list(blocks),
        "fenced": fenced,
        "names": list(names),
        "steps": [(step.kind, step.source) for step in steps],
    }
    return f"{_harness()}\n\nmain(json.loads({json.dumps(job)!r}))\n"


@dataclass(frozen=True)
class Report:
    """What a program of `program` printed of its own.

    Attributes:
        parses: None where it did not get that far.
        problem: Why no test was run; "" where all were begun.
        seen: By step, the value as `harness.encode` writes it, and for people.
        raised: By step, the exception.
        ended: Whether all steps were gone through.
    """

    parses: bool | None
    defines: bool
    problem: str
    seen: dict[int, tuple[str, str]]
    raised: dict[int, str]
    ended: bool


def read_report(output: str, mark: str) -> Report:
    """Find the report among whatever else a program printed. Hostile lines are passed over; the first of a kind counts.

    Time is linear in the length of the output.
    """
    kinds: dict[str, str] = {}
    seen: dict[int, tuple[str, str]] = {}
    raised: dict[int, str] = {}
    for match in re.finditer(rf"^{re.escape(mark)}(.*)$", output, re.MULTILINE):
        entry = _entry(match[1])
        if entry is None:
            continue
        kind, at, value, shown = entry
        if kind == "saw":
            seen.setdefault(at, (value, shown))
        elif kind == "raised":
            raised.setdefault(at, shown)
        else:
            kinds.setdefault(kind, shown)
    problem = next((kinds[kind] for kind in ("unparsed", "broken", "missing") if kind in kinds), "")
    return Report(
        parses=False if "unparsed" in kinds else True if "parsed" in kinds else None,
        defines="missing" not in kinds,
        problem=problem,
        seen=seen,
        raised=raised,
        ended="end" in kinds,
    )


def _entry(text: str) -> tuple[str, int, str, str] | None:
    try:
        entry: Any = from_json(text)
    except ValueError:
        return None
    if not isinstance(entry, list) or len(entry) != 4:
        return None
    kind, at, value, shown = entry
    strings = isinstance(kind, str) and isinstance(value, str) and isinstance(shown, str)
    return (kind, at, value, shown) if strings and isinstance(at, int) else None


@dataclass(frozen=True)
class Comparison:
    """How the tests went.

    Attributes:
        total: Tests.
        passed: Those that saw what they expect.
        first_wrong: What the first other one saw, in a few words; "" where there is none.
    """

    total: int
    passed: int
    first_wrong: str

    @property
    def all_passed(self) -> bool:
        """Whether every test did, and nothing failed between them."""
        return self.passed == self.total and not self.first_wrong


def compare(steps: Sequence[Step], report: Report) -> Comparison:
    """Hold what was seen against what is expected."""
    wrong: list[str] = []
    passed = 0
    for at, step in enumerate(steps):
        value, shown = report.seen.get(at, ("", ""))
        if at in report.raised:
            wrong.append(f"{step.source} raised {report.raised[at]}")
        elif step.is_test and at in report.seen and value == step.expected:
            passed += 1
        elif step.is_test:
            wrong.append(f"{step.source} gave {shown}, not {step.shown}" if at in report.seen else "")
    total = sum(step.is_test for step in steps)
    return Comparison(total, passed, next((text for text in wrong if text), ""))
