"""Which code of an answer is run, how what it does is compared with what is expected, and how many run at once."""

from __future__ import annotations

import math
import os
import threading
import time
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distill.errors import InputError
from mlx_distill.evaluation import (
    EvalTask,
    Outcome,
    harness,
    python_tests,
    score_answer,
    score_answers,
    scoring,
    sql_tests,
)
from mlx_distill.evaluation.tasks import SqlCase
from tests.evaluation.asked import NAMES, QUICK, TRIPLE, fenced

RIGHT = "def triple(n):\n    return 3 * n\n"
WRONG = "def triple(n):\n    return n + 14\n"


@pytest.mark.parametrize(
    ("answer", "outcome", "detail"),
    [
        (fenced(RIGHT), "passed", "All 3 tests passed."),
        (fenced(WRONG), "failed", "triple(-2) gave 12, not -6"),
        (fenced("def triple(n):\n    return {}[n]"), "failed", "triple(7) raised KeyError: 7"),
        (fenced("def triple(n):\n    raise ValueError('\\ud800')"), "failed", r"triple(7) raised ValueError: \ud800"),
        (fenced("def triple(n):\n    return '\\x1b\\ud800'"), "failed", r"triple(7) gave '\x1b\ud800', not 21"),
        (fenced("def thrice(n):\n    return 3 * n"), "error", "It does not define triple."),
        (fenced("import numpy\n" + RIGHT), "error", "It ended before the tests: ModuleNotFoundError: No module named"),
        (fenced("def triple(n)\n    return 3 * n"), "not_parsed", "SyntaxError: expected ':'"),
        (fenced(RIGHT + "raise SystemExit(3)"), "passed", "All 3"),
        (fenced(RIGHT + "if __name__ == '__main__':\n    print(input())"), "passed", "All 3"),
        (fenced("def test_mine(): assert False\n" + RIGHT), "passed", "All 3"),
        ("I would not.", "no_code", "It holds no Python."),
    ],
)
def test_outcomes_say_what_happened(answer: str, outcome: str, detail: str) -> None:
    found = score_answer(TRIPLE, answer)
    assert (found.outcome, found.passed, found.task_id) == (outcome, outcome == "passed", "triple")
    assert detail in found.detail
    assert found.tests == 3


BLOCKS = {
    "an example after it": (fenced(RIGHT) + fenced("print(triple(open('no.txt')))"), True),
    "an alternative after it": (fenced(RIGHT) + fenced(WRONG), True),
    "a helper before it": (
        fenced("def add(a, b): return a + b") + fenced("def triple(n): return add(n, add(n, n))"),
        True,
    ),
    "a broken sketch before it": (fenced("def triple(n):\n    <your code here>") + fenced(RIGHT), True),
    "the shell before it": (fenced("pip install triple", "bash") + fenced(RIGHT), True),
    "a console session after it": (fenced(RIGHT) + fenced(">>> triple(1)\n3"), True),
    "unlabelled output after it": (fenced(RIGHT) + fenced("21", ""), True),
    "one function in two blocks": (fenced("def triple(n):") + fenced("    return 3 * n"), True),
    "another spelling of the label": (fenced(RIGHT, "Python3"), True),
    "tildes": (f"~~~py\n{RIGHT}~~~", True),
    "in a list": ("- so:\n\n  ```python\n  def triple(n):\n      return 3 * n\n  ```\n", True),
    "only an assignment": (fenced("triple = lambda n: 3 * n"), True),
    "the wrong one first": (fenced(WRONG) + fenced(RIGHT), False),
    "a method": (fenced("class A:\n    def triple(self, n): return 3 * n"), False),
    "in prose": ("Use `triple = lambda n: 3 * n`.", False),
    "indented": ("So:\n\n    def triple(n):\n        return 3 * n\n", False),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_code_that_answers_is_found(name: str) -> None:
    answer, passes = BLOCKS[name]
    found = score_answer(TRIPLE, answer)
    assert found.passed is passes, found


def test_code_before_the_answer_is_there_and_is_no_answer() -> None:
    task = TRIPLE.model_copy(update={"setup": "import math\ndef triple(n): ..."})
    assert score_answer(task, fenced("def triple(n): return math.prod((3, n))")).passed
    assert score_answer(task, fenced("x = 1")).detail == "It does not define triple."


def test_state_lasts_from_step_to_step_and_a_failing_step_fails() -> None:
    tests = "from collections import Counter\nc = Counter()\nc[triple(1)] += 1\nassert c == {3: 1}\n"
    task = TRIPLE.model_copy(update={"tests": tests})
    assert score_answer(task, fenced(RIGHT)).passed
    broken = TRIPLE.model_copy(update={"tests": "assert triple(1) == 3\nnothing()\nassert triple(2) == 6"})
    found = score_answer(broken, fenced(RIGHT))
    assert (found.outcome, found.tests_passed, found.tests) == ("failed", 2, 2)
    assert found.detail == "nothing() raised NameError: name 'nothing' is not defined"


@pytest.mark.parametrize(
    ("source", "kind", "seen", "expected"),
    [
        ("assert f(1) == [2, 'x']", "see", "f(1)", [2, "x"]),
        ("assert -3 == f(1)", "see", "f(1)", -3),
        ("assert f(1) is None", "see", "f(1)", None),
        ("assert not f(1)", "see", "bool(f(1))", False),
        ("assert f(1)", "see", "bool(f(1))", True),
        ("assert f(1) == g(1)", "see", "bool(f(1) == g(1))", True),
        ("assert f(1) != 3", "see", "bool(f(1) != 3)", True),
        ("assert 1 == f(1) == 1", "see", "bool(1 == f(1) == 1)", True),
        ("assert f(1) == set(), 'message'", "see", "f(1)", set()),
        ("for n in g: assert f(n)", "try", "for n in g:\n    assert f(n)", None),
        ("x = f(1)", "do", "x = f(1)", None),
        ("def g(): assert False", "do", "def g():\n    assert False", None),
    ],
)
def test_asserts_are_split(source: str, kind: str, seen: str, expected: Any) -> None:
    (step,) = python_tests.read_steps(source)
    assert (step.kind, step.source, step.expected) == (kind, seen, harness.encode(expected))


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.frozensets(st.integers() | st.text(max_size=2), max_size=4)
    ),
    max_leaves=12,
)


@given(PLAIN, PLAIN)
def test_values_are_written_alike_just_where_they_are_equal(one: Any, other: Any) -> None:
    assert harness.encode(one).isascii()
    assert (harness.encode(one) == harness.encode(other)) == (one == other)
    assert harness.encode(one) == harness.encode(eval(repr(one), {"inf": math.inf}))


def test_what_is_equal_in_python_is_equal_here() -> None:
    pairs: list[tuple[Any, Any]] = [(1, 1.0), (1, True), (0.0, -0.0), ({1: 2, 3: 4}, {3: 4, 1: 2}), ({1, 2}, {2, 1})]
    pairs += [(10**400, 10**400), ([0] * 5000, [0] * 5000), (frozenset({1}), {1}), (b"x", bytearray(b"x"))]
    for one, other in pairs:
        assert harness.encode(one) == harness.encode(other)
    apart: list[tuple[Any, Any]] = [
        ([1], (1,)),
        ("1", 1),
        (b"x", "x"),
        ([0] * 5000, [0] * 5001),
        ({}, set()),
        (0, None),
    ]
    apart += [(0.1 + 0.2, 0.3), (2**53, 2**53 + 1), (object(), object), ("[1]", [1]), (float("inf"), -float("inf"))]
    for one, other in apart:
        assert harness.encode(one) != harness.encode(other)
    assert harness.encode(float("nan")) == harness.encode(float("nan"))


@pytest.mark.parametrize(
    ("answer", "outcome", "passed"),
    [
        ("SELECT name FROM people", "passed", 2),
        ("SELECT name FROM people; -- all of them", "passed", 2),
        ("-- all\nWITH p AS (SELECT * FROM people) SELECT name FROM p", "passed", 2),
        ("SELECT name FROM people ORDER BY name DESC", "passed", 2),
        ("SELECT name FROM people WHERE age IS NOT NULL", "failed", 1),
        ("SELECT name, age FROM people", "failed", 0),
        ("SELECT upper(name) FROM people", "failed", 0),
        ("SELECT name FROM people UNION ALL SELECT name FROM people", "failed", 0),
        ("CREATE TABLE people (name TEXT)", "error", 0),
        ("SELEC name FROM people", "not_parsed", 0),
    ],
)
def test_sql_is_run_on_every_case(answer: str, outcome: str, passed: int) -> None:
    found = score_answer(NAMES, fenced(answer, "sql"))
    assert (found.outcome, found.tests_passed, found.tests) == (outcome, passed, 2), found
    assert found.parses is (outcome != "not_parsed")


@pytest.mark.parametrize("text", ["```SQLite\n{}\n```", "```\n{}\n```", "{}", "-- so\n{}", "```postgresql\n{}"])
def test_sql_is_found_with_and_without_a_fence(text: str) -> None:
    assert score_answer(NAMES, text.format("SELECT name FROM people")).passed
    assert score_answer(NAMES, "The names are in people.").outcome == "no_code"


def test_of_several_sql_blocks_the_first_counts() -> None:
    assert score_answer(NAMES, fenced("SELECT name FROM people", "sql") + fenced("SELECT 1", "sql")).passed
    assert not score_answer(NAMES, fenced("SELECT 1", "sql") + fenced("SELECT name FROM people", "sql")).passed


def test_what_an_answer_changes_is_looked_at_where_that_is_asked() -> None:
    task = NAMES.model_copy(
        update={
            "check": "SELECT name, age FROM people ORDER BY name",
            "case": (SqlCase(expected="Ada | NULL\nBob | 2.50"),),
        }
    )
    insert = "INSERT INTO people VALUES ('Bob', 2.5), ('Ada', NULL);"
    assert score_answer(task, fenced(f"{insert} SELECT 'done';", "sql")).passed
    assert score_answer(task, fenced(f"BEGIN; {insert}", "sql")).passed
    assert not score_answer(task, fenced(f"BEGIN; {insert} ROLLBACK;", "sql")).passed


def test_order_matters_where_it_is_asked_for() -> None:
    task = NAMES.model_copy(update={"ordered": True})
    found = score_answer(task, fenced("SELECT name FROM people ORDER BY name DESC", "sql"))
    assert (found.outcome, found.detail) == ("failed", "Case 1: the rows are in another order.")


@pytest.mark.parametrize(
    ("found", "expected", "same"),
    [
        ("a | 1", "a|1.0", True),
        ("0.1", "0.10000000001", True),
        ("0.1", "0.1001", False),
        ("1\n1\n2", "1\n2\n1", True),
        ("1\n1\n2", "1\n2\n2", False),
        ("NULL", "0", False),
        ("2024-01-01", "2024-01-02", False),
        ("nan", "nan", True),
        ("1_0", "10", False),
        ("a | b", "a", False),
        ("1.0000000001 | b\n1 | a", "1 | b\n1.0000000001 | a", True),
        ("", "", True),
    ],
)
def test_rows_are_compared_by_value(found: str, expected: str, same: bool) -> None:
    rows = [sql_tests.read_rows(text) for text in (found, expected)]
    assert sql_tests.same_rows(*rows, ordered=False) is same
    assert sql_tests.same_rows(*reversed(rows), ordered=False) is same


def test_tables_that_cannot_be_made_are_the_tasks_fault() -> None:
    task = NAMES.model_copy(update={"case": (SqlCase(rows="INSERT INTO nowhere VALUES (1);", expected="1"),)})
    with pytest.raises(InputError, match=r"task names: the tables of case 1 cannot be made: .*nowhere"):
        score_answer(task, fenced("SELECT 1", "sql"))


def test_open_tasks_say_whether_their_own_code_runs() -> None:
    task = EvalTask(
        id="show", family="systems", difficulty="easy", kind="open", prompt="Show a queue.", reference="A queue."
    )
    passing = score_answer(task, fenced("def test_it(): assert 1 == 1") + fenced("SELECT 1", "sql"))
    assert (passing.outcome, passing.tests, passing.tests_passed) == ("passed", 1, 1)
    assert score_answer(task, fenced("def test_it(): assert 1 == 2")).outcome == "failed"
    assert score_answer(task, fenced("raise ValueError")).outcome == "error"
    assert score_answer(task, fenced("def f(:")).outcome == "not_parsed"
    assert score_answer(task, fenced("while True: pass"), limits=QUICK).outcome == "timeout"
    assert score_answer(task, fenced("SELECT 1", "sql")).passed
    assert score_answer(task, fenced("SELECT", "sql")).outcome == "not_parsed"
    assert score_answer(task, "Nothing.").outcome == "no_code"


def test_many_are_scored_in_order_and_with_canaries_first() -> None:
    answers = [fenced(RIGHT), "none", fenced(WRONG), fenced(RIGHT)]
    pairs = [*((TRIPLE, text) for text in answers), (NAMES, "SELECT name FROM people")]
    outcomes = list(score_answers(pairs, sandbox="off"))
    assert [outcome.outcome for outcome in outcomes] == ["passed", "no_code", "failed", "passed", "passed"]
    assert [outcome.task_id for outcome in outcomes] == ["triple"] * 4 + ["names"]
    assert list(score_answers([], sandbox="off")) == []


@pytest.mark.parametrize(("jobs", "at_most"), [(None, 3), (100, 3), (2, 2), (0, 3), (-5, 1)])
def test_no_more_run_at_once_than_there_are_cores(
    jobs: int | None, at_most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, running, most = threading.Lock(), 0, 0
    gate = threading.Event()

    def score(task: EvalTask, text: str, *, sandbox: bool) -> Outcome:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running == at_most:
                gate.set()
        assert gate.wait(20)
        with lock:
            running -= 1
        return Outcome(task_id=task.id, outcome="passed", detail=text)

    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    monkeypatch.setattr(scoring, "score_answer", score)
    monkeypatch.setattr(scoring, "choose_isolation", lambda sandbox, *, pool, progress: False)
    outcomes = list(score_answers([(TRIPLE, str(at)) for at in range(30)], jobs=jobs, sandbox="off"))
    assert [outcome.detail for outcome in outcomes] == [str(at) for at in range(30)]
    assert most == at_most


def test_closing_it_runs_nothing_that_has_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def score(task: EvalTask, text: str, *, sandbox: bool) -> Outcome:
        begun.append(text)
        time.sleep(0.01)
        return Outcome(task_id=task.id, outcome="passed", detail="")

    monkeypatch.setattr(scoring, "score_answer", score)
    monkeypatch.setattr(scoring, "choose_isolation", lambda sandbox, *, pool, progress: False)
    with closing(score_answers([(TRIPLE, str(at)) for at in range(500)], jobs=2, sandbox="off")) as outcomes:
        assert next(outcomes).passed
    assert len(begun) < 100
