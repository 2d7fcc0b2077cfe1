"""Every task that ships is fair and tells right from wrong: references pass, near misses fail, none is trained on."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from mlx_distill.evaluation import EvalTask, Outcome, as_prompts, harness, load_tasks, python_tests, score_answer
from mlx_distill.execution import Execution, Limits, run_python
from mlx_distill.prompts import load_prompts
from mlx_distill.quality.contamination import contaminated
from mlx_distill.teachers.recorded import recordings

DATA = Path(__file__).parents[2] / "data"
TASKS = load_tasks()
PYTHON = [task for task in TASKS if task.kind == "python"]
SQL = [task for task in TASKS if task.kind == "sql"]
OURS = {task.id: task.prompt for task in TASKS if task.objective}
FAMILIES = sorted({task.family for task in PYTHON})


@pytest.fixture(scope="module")
def references(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Outcome]]]:
    """Outcomes of the chosen tasks' references, two programs at a time."""
    here = [item for item in request.session.items if "references" in getattr(item, "fixturenames", ())]
    chosen: set[EvalTask] = {getattr(item, "callspec").params["task"] for item in here}  # noqa: B009 - not declared
    with ThreadPoolExecutor(2) as pool:
        ordered = [task for task in TASKS if task in chosen]
        yield {task.id: pool.submit(score_answer, task, task.reference_answer) for task in ordered}


def named(task: EvalTask) -> str:
    return task.id


def test_there_are_as_many_as_are_promised() -> None:
    assert len(PYTHON) >= 60
    assert len(SQL) >= 12
    assert Counter(task.difficulty for task in PYTHON)["easy"] >= 35
    assert Counter(task.difficulty for task in PYTHON)["medium"] >= 25
    assert [task.id for task in TASKS if not task.objective] == [
        p.id for p in load_prompts(DATA / "prompts/heldout.toml")
    ]
    counts = f"{len(PYTHON)} in Python, {len(SQL)} in SQL, and the four held-out prompts"
    assert counts in (DATA / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("task", TASKS, ids=named)
def test_the_reference_passes(task: EvalTask, references: dict[str, Future[Outcome]]) -> None:
    outcome = references[task.id].result()
    assert outcome.passed, outcome
    assert outcome.tests_passed == outcome.tests
    assert outcome.parses is True
    assert not task.objective or outcome.tests == task.test_count


@pytest.fixture(scope="module")
def near_misses() -> dict[str, list[str]]:
    """By task, what each of its near misses came to: "passed", or what went wrong. One process a family."""
    marks = {(task.id, code): secrets.token_hex(8) for task in PYTHON for code in task.wrong}

    def run(family: str) -> Execution:
        return run_python(_together([task for task in PYTHON if task.family == family], marks), limits=ROOMY)

    with ThreadPoolExecutor(2) as pool:
        outputs = dict(zip(FAMILIES, pool.map(run, FAMILIES), strict=True))
    found: dict[str, list[str]] = {}
    for task in PYTHON:
        assert outputs[task.family].passed, outputs[task.family]
        reports = [python_tests.read_report(outputs[task.family].stdout, marks[task.id, code]) for code in task.wrong]
        assert all(report.ended and report.defines for report in reports), task.id
        compared = [python_tests.compare(task.steps, report) for report in reports]
        found[task.id] = ["passed" if one.all_passed else one.first_wrong for one in compared]
    return found


ROOMY = Limits(seconds=60, cpu_seconds=60, output_bytes=8 << 20, tail_bytes=8 << 20)


def _together(tasks: list[EvalTask], marks: dict[tuple[str, str], str]) -> str:
    """One program of many: they are ours, and need not be kept apart."""
    shared = Path(harness.__file__).read_text(encoding="utf-8")
    calls = []
    for task in tasks:
        for code in task.wrong:
            mark = marks[task.id, code]
            program = python_tests.program([code], setup=task.setup, names=task.defines, steps=task.steps, mark=mark)
            calls.append(program.removeprefix(shared))
    return shared + "".join(calls)


@pytest.mark.slow
@pytest.mark.parametrize("task", PYTHON, ids=named)
def test_near_misses_in_python_fail(task: EvalTask, near_misses: dict[str, list[str]]) -> None:
    assert task.wrong
    assert "passed" not in near_misses[task.id]
    assert all(near_misses[task.id]), "no test says what is wrong"


@pytest.mark.parametrize("task", SQL, ids=named)
def test_near_misses_in_sql_fail(task: EvalTask) -> None:
    assert task.wrong
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda answer: score_answer(task, answer).outcome, task.wrong_answers))
    assert outcomes == ["failed"] * len(task.wrong)


@pytest.mark.parametrize("task", PYTHON, ids=named)
def test_no_task_is_passed_by_guessing(task: EvalTask) -> None:
    """Some tests expect more than true, false or nothing, and all of them are asserts of their own."""
    plain = {harness.encode(value) for value in (True, False, None)}
    telling = [step for step in task.steps if step.is_test and step.expected not in plain]
    assert len(telling) >= 2
    assert not [step for step in task.steps if step.kind == "try"]
    assert task.test_count >= 3


@pytest.mark.parametrize("task", PYTHON, ids=named)
def test_the_prompt_names_what_is_called(task: EvalTask) -> None:
    assert all(f"`{name}" in task.prompt for name in task.defines)
    assert "Python" in task.prompt


@pytest.mark.parametrize("task", SQL, ids=named)
def test_the_prompt_names_the_tables(task: EvalTask) -> None:
    for statement in task.setup.split("CREATE TABLE ")[1:]:
        assert f"`{statement.split()[0]}(" in task.prompt
    assert "SQLite" in task.prompt


def test_no_prompt_is_close_to_one_that_is_trained_on() -> None:
    prompts = load_prompts(DATA / "prompts" / "coding.toml") + load_prompts(DATA / "prompts" / "heldout.toml")
    training = {prompt.id: prompt.text for prompt in prompts}
    starter = {str(at): str(found.conversation[-1][1]) for at, found in enumerate(recordings(DATA / "starter"))}
    assert len(starter) == len(training) == 108
    for other in (training, starter):
        assert contaminated(other, OURS) == {}
        assert contaminated(OURS, other) == {}


def test_no_two_tasks_are_close_to_one_another() -> None:
    for identity, text in OURS.items():
        others = {name: other for name, other in OURS.items() if name != identity}
        assert contaminated({identity: text}, others) == {}


def test_they_can_be_asked_like_any_prompts() -> None:
    prompts = as_prompts(TASKS)
    assert [(p.id, p.text) for p in prompts] == [(task.id, task.prompt) for task in TASKS]
    assert len({prompt.family for prompt in prompts}) == len(TASKS)
    assert {prompt.field for prompt in prompts} == {task.family for task in TASKS}
