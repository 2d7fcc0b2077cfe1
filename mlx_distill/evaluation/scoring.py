"""Runs the code of answers against the tests of their tasks, several at a time, and says what came of each.

Whatever an answer is, its outcome is one of `Ending`; none stops the others. Text beyond `MOST_CHARACTERS` is not
looked at. The code of an answer is

- for Python: its fenced blocks, labelled as Python or, where none is, not labelled. Taken are the first of those that
  parse which together define what the task asks for; so an example of use after them, or a broken sketch before, does
  no harm. Where there are none such, all blocks are. Recorded console sessions are left out.
- for SQL: the first such block.
- without any fence: the whole text, if it is code that defines what is asked for, or begins as a statement does.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import cast

from mlx_distill.code_blocks import code_blocks, source
from mlx_distill.config import Confinement
from mlx_distill.errors import InputError
from mlx_distill.evaluation import python_tests, sql_tests
from mlx_distill.evaluation.tasks import EvalTask, SqlCase
from mlx_distill.execution import Execution, Limits, isolation_level, run_python, run_sql
from mlx_distill.progress import SILENT, Progress
from mlx_distill.quality.verify import choose_isolation
from mlx_distill.records import content_hash
from mlx_distill.scores import Ending, Outcome

#: Raised when a change makes the same answer pass or fail otherwise.
CODE_FORMAT = 1

#: Text beyond this many characters is not looked at: a hundred thousand tokens fit.
MOST_CHARACTERS = 500_000

#: What one answer's program may use. All output is kept: what the tests saw is in it.
LIMITS = Limits(
    seconds=8, cpu_seconds=6, memory_bytes=512 << 20, processes=16, disk_bytes=16 << 20, tail_bytes=(1 << 20) + 1
)
#: Open tasks bring tests of their own, some of which wait.
OPEN_LIMITS = Limits(seconds=20, cpu_seconds=20)

_DETAIL_CHARACTERS = 300


def scoring_sha256(task: EvalTask) -> str:
    """Hash of all that decides how an answer to a task is scored, this code included."""
    fields = {"kind", "defines", "setup", "tests", "case", "check", "ordered"}
    return content_hash([task.model_dump(mode="json", include=fields), CODE_FORMAT])


def score_answers(
    pairs: Iterable[tuple[EvalTask, str]],
    *,
    jobs: int | None = None,
    sandbox: Confinement,
    progress: Progress = SILENT,
) -> Generator[Outcome, None, None]:
    """Score answers, several at a time, and give each outcome when those before it are there.

    Blocks; call it from a thread in asynchronous code. Before the first, canaries show that programs are judged rightly
    here, and that the sandbox holds. An interruption, or closing it, waits for the programs under way alone.

    Args:
        pairs: Tasks with an answer each, in Markdown; a task may come with many.
        jobs: Programs at once, at most as many as there are cores; None: that many.
        sandbox: Whether inside the operating system's sandbox; "auto": where it is installed and holds.

    Yields:
        In the order of `pairs`.

    Raises:
        DependencyError: A sandbox is required and its package is not installed.
        IsolationError: A sandbox is required and there is none that holds, or programs cannot be judged here at all.
        ResourceError: No temporary folder could be made.
        InputError: The tables of a SQL task cannot be made.
    """
    todo = list(pairs)
    if not todo:
        return
    cores = os.cpu_count() or 1
    workers = max(1, min(jobs or cores, cores))
    with progress.task("Testing answers", total=len(todo), unit="answers") as bar, ThreadPoolExecutor(workers) as pool:
        confined = choose_isolation(sandbox, pool=pool, progress=progress)
        # Should one raise, or an interruption come, `map` takes back those not yet begun.
        for outcome in pool.map(lambda pair: score_answer(*pair, sandbox=confined), todo):
            bar.advance()
            yield outcome


def score_answer(task: EvalTask, text: str, *, sandbox: bool = False, limits: Limits | None = None) -> Outcome:
    """Score one answer; see `score_answers`, which takes care of isolation besides.

    Args:
        text: Markdown that nobody has read.
        sandbox: Whether the operating system confines its code.
        limits: Instead of `LIMITS`, or `OPEN_LIMITS` for an open task.

    Raises:
        IsolationError: A sandbox is asked for where there is none.
        ResourceError: No temporary folder could be made.
        InputError: The tables of a SQL task cannot be made.
    """
    text = text[:MOST_CHARACTERS]
    if task.kind == "open":
        return _open(task, text, sandbox=sandbox, limits=limits or OPEN_LIMITS)
    blocks, fenced = _blocks(text, task.kind)
    if not any(block.strip() for block in blocks):
        return _no_code(task)
    score = _python if task.kind == "python" else _sql
    return score(task, blocks, fenced=fenced, sandbox=sandbox, limits=limits or LIMITS)


def _no_code(task: EvalTask) -> Outcome:
    language = {"python": "Python", "sql": "SQL", "open": "Python and no SQL"}[task.kind]
    return Outcome(task_id=task.id, outcome="no_code", detail=f"It holds no {language}.", tests=task.test_count)


def _blocks(text: str, language: str) -> tuple[list[str], bool]:
    """The code of an answer, and whether it stands in fences."""
    blocks = [block for block in code_blocks(text) if not block.text.lstrip().startswith(">>> ")]
    for label in (language, ""):
        if found := [block.text for block in blocks if block.language == label]:
            return found, True
    if blocks or (language == "sql" and not sql_tests.looks_like_sql(text)):
        return [], False
    return [text], False


def _python(task: EvalTask, blocks: list[str], *, fenced: bool, sandbox: bool, limits: Limits) -> Outcome:
    mark, steps = secrets.token_hex(16), task.steps
    program = python_tests.program(blocks, fenced=fenced, setup=task.setup, names=task.defines, steps=steps, mark=mark)
    execution = run_python(program, limits=limits, sandbox=sandbox)
    report = python_tests.read_report(execution.stdout, mark)
    found = python_tests.compare(steps, report)
    make = partial(_outcome, task, execution, sandbox=sandbox, parses=report.parses, passed=found.passed)
    if not fenced and not report.defines:
        return _no_code(task)
    if execution.outcome not in ("passed", "failed"):
        return make(_limit(execution), str(execution.problem))
    if report.parses is False:
        return make("not_parsed", report.problem)
    if not report.defines:
        return make("error", f"It does not define {report.problem}.")
    if report.problem:
        return make("error", f"It ended before the tests: {report.problem}")
    if not report.ended or not execution.passed:
        return make("error", execution.problem or "It left before the tests were over.")
    if found.all_passed:
        return make("passed", f"All {found.total} tests passed.")
    return make("failed", found.first_wrong or "A test reported nothing.")


def _sql(task: EvalTask, blocks: list[str], *, fenced: bool, sandbox: bool, limits: Limits) -> Outcome:
    passed, seconds = 0, 0.0
    parses: bool | None = None
    wrong: tuple[Ending, str] | None = None
    for number, case in enumerate(task.case, start=1):
        marks = (secrets.token_hex(16), secrets.token_hex(16))
        script = sql_tests.script(f"{task.setup}\n;{case.rows}", blocks[0], task.check, marks)
        execution = run_sql(script, limits=limits, sandbox=sandbox)
        seconds += execution.seconds
        ending, detail = _case(task, case, number, execution, marks)
        if ending == "passed":
            passed += 1
        elif wrong is None:
            wrong = ending, detail
        parses = ending != "not_parsed" if execution.outcome in ("passed", "failed") else parses
        if ending not in ("passed", "failed"):
            break  # a limit that one case passed is passed by the next as well, at the same cost
    ending, detail = wrong or ("passed", f"All {len(task.case)} tests passed.")
    return Outcome(
        task_id=task.id,
        outcome=ending,
        detail=_line(detail),
        parses=parses,
        tests=len(task.case),
        tests_passed=passed,
        seconds=round(seconds, 3),
        isolation=str(isolation_level(sandbox=sandbox)),
    )


def _case(
    task: EvalTask, case: SqlCase, number: int, execution: Execution, marks: tuple[str, str]
) -> tuple[Ending, str]:
    if execution.outcome not in ("passed", "failed"):
        return _limit(execution), str(execution.problem)
    if execution.outcome == "failed" and marks[0] not in execution.stdout:
        raise InputError(f"task {task.id}: the tables of case {number} cannot be made: {execution.problem}")
    problem = execution.problem or ""
    if not execution.passed:
        return ("not_parsed" if sql_tests.does_not_parse(problem) else "error"), problem
    found = sql_tests.rows_between(execution.stdout, marks, after=bool(task.check))
    if found is None:
        return "not_parsed", "It does not end: what follows it is taken for a part of it."
    expected = sql_tests.read_rows(case.expected)
    if sql_tests.same_rows(found, expected, ordered=task.ordered):
        return "passed", ""
    if len(found) != len(expected):
        return "failed", f"Case {number}: {len(found)} rows, not {len(expected)}."
    order = sql_tests.same_rows(found, expected, ordered=False)
    return "failed", f"Case {number}: the rows are {'in another order' if order else 'others'}."


def _open(task: EvalTask, text: str, *, sandbox: bool, limits: Limits) -> Outcome:
    """Whether the answer's own code runs, with the tests that it brings: no more than that can be told."""
    blocks = code_blocks(text)
    for language, run in (("python", run_python), ("sql", run_sql)):
        code = source(blocks, language)
        if not code.strip():
            continue
        execution = run(code, limits=limits, sandbox=sandbox)
        passed = execution.tests_run - execution.tests_failed
        make = partial(_outcome, task, execution, sandbox=sandbox, passed=passed, tests=execution.tests_run)
        if execution.passed:
            return make("passed", "It ran to its end.", parses=True)
        if execution.outcome != "failed":
            return make(_limit(execution), str(execution.problem), parses=None)
        problem = str(execution.problem)
        syntax = execution.error in ("SyntaxError", "IndentationError", "TabError")
        if syntax or (language == "sql" and sql_tests.does_not_parse(problem)):
            return make("not_parsed", problem, parses=False)
        return make("failed" if execution.tests_failed else "error", problem, parses=True)
    return _no_code(task)


def _outcome(
    task: EvalTask,
    execution: Execution,
    ending: Ending,
    detail: str,
    *,
    sandbox: bool,
    parses: bool | None,
    passed: int,
    tests: int | None = None,
) -> Outcome:
    return Outcome(
        task_id=task.id,
        outcome=ending,
        detail=_line(detail),
        parses=parses,
        tests=task.test_count if tests is None else tests,
        tests_passed=passed,
        seconds=round(execution.seconds, 3),
        isolation=str(isolation_level(sandbox=sandbox)),
    )


def _limit(execution: Execution) -> Ending:
    # Canaries have shown that programs start here; one that hides that it did is no better than one that crashed.
    return "crashed" if execution.outcome == "not_started" else cast(Ending, execution.outcome)


def _line(text: str) -> str:
    """On one line, without what a terminal or a log would take for a command."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(shown.split())[:_DETAIL_CHARACTERS]
