"""Runs the Python in answers, with its tests, and says which of them hold.

All Python blocks of an answer are joined to one program, which runs in a process of its own within limits and, where
there is one, in the operating system's sandbox; see `mlx_distill.execution` for what that holds off. It passes if it
runs to its end and none of its tests fails. Before the first of them, canaries show that the runner can tell right
from wrong and that the sandbox holds; nothing is verified by a runner that they find wrong.

What passes is not thereby right: a program without tests need only end without an error. What fails is not thereby
wrong either: it may need a package, a file or a network that is not there. Other languages than Python are not run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack

from mlx_distill.code_blocks import code_blocks, source
from mlx_distill.config import Confinement
from mlx_distill.errors import DependencyError, IsolationError
from mlx_distill.execution import Execution, Limits, isolation_level, run_python, sandbox_support
from mlx_distill.progress import SILENT, Progress
from mlx_distill.quality.canaries import BASIC, Canary, confinement
from mlx_distill.records import Record

#: Raised when a change makes the same answer pass or fail otherwise.
CODE_FORMAT = 1

LIMITS = Limits(seconds=20, cpu_seconds=20)

#: Whether canaries have sung in this process, within the sandbox and without. They take over a second, and a machine
#: does not change its mind.
_sung: set[bool] = set()


class Verification(Record):
    """What came of an answer's Python.

    Attributes:
        passed: None where the answer holds no Python.
        detail: What happened, in one sentence, without anything of the answer but an error's own message.
        isolation: How the program was kept apart, such as "process" or "sandbox (Landlock V6 and seccomp)"; None
            where none ran.
        tests: Tests that ran.
        seconds: Wall time.
    """

    passed: bool | None
    detail: str
    isolation: str | None = None
    tests: int = 0
    seconds: float = 0.0


def verify_answers(
    answers: Mapping[str, str],
    *,
    sandbox: Confinement,
    progress: Progress = SILENT,
    workers: int = 2,
) -> dict[str, Verification]:
    """Run the Python in each answer.

    Blocks until all have run; call it from a thread in asynchronous code. An interruption waits for the programs
    under way, at most some seconds longer than their limit.

    Args:
        answers: Markdown by id.
        sandbox: Whether inside the operating system's sandbox; "auto": where it is installed and holds.
        workers: Programs at once.

    Returns:
        By id, in the order of `answers`.

    Raises:
        DependencyError: A sandbox is required and its package is not installed.
        IsolationError: A sandbox is required and this system has none, or a canary shows that it does not hold; or
            one shows that programs are not judged rightly here at all.
        ResourceError: No temporary folder could be made.
    """
    programs = ((identity, source(code_blocks(text), "python")) for identity, text in answers.items())
    runnable = {identity: code for identity, code in programs if code.strip()}
    found = {identity: Verification(passed=None, detail="It holds no Python.") for identity in answers}
    if not runnable:
        return found
    with progress.task("Verifying", total=len(runnable), unit="answers") as bar, ThreadPoolExecutor(workers) as pool:
        confined = choose_isolation(sandbox, pool=pool, progress=progress)
        isolation = str(isolation_level(sandbox=confined))
        for identity, execution in _run_all(runnable, pool, confined, at_once=2 * workers):
            found[identity] = _verification(execution, isolation)
            bar.advance()
    return found


def choose_isolation(sandbox: Confinement, *, pool: ThreadPoolExecutor, progress: Progress = SILENT) -> bool:
    """Let the canaries sing, and say whether programs shall run in the sandbox.

    Args:
        sandbox: As for `verify_answers`.
        pool: Where they run.
        progress: Is told how programs are kept apart, and why there is no sandbox where one might have been.

    Raises:
        DependencyError, IsolationError: As for `verify_answers`.
    """
    confined = _holds(sandbox, pool, progress)
    level = isolation_level(sandbox=confined)
    progress.say(
        f"The answers' code runs in child processes with limits (isolation: {level}; not covered: "
        f"{', '.join(level.not_covered) or 'nothing known'})."
    )
    return confined


def _holds(sandbox: Confinement, pool: ThreadPoolExecutor, progress: Progress) -> bool:
    support = sandbox_support()
    if sandbox == "required" and support.problem is not None:
        if not support.installed:
            raise DependencyError("nono-py", extra="sandbox")
        raise IsolationError(support.problem, hint="Without it, programs run with your rights, under limits alone.")
    if sandbox != "off" and support.problem is None:
        wrong = _wrong_canary(pool, sandbox=True)
        if wrong is None:
            return True
        if sandbox == "required":
            raise IsolationError(
                f"the sandbox ({support.mechanism}) does not hold here: {wrong}.",
                hint="Without it, programs run with your rights, under limits alone.",
            )
        progress.say(f"The sandbox ({support.mechanism}) does not hold here: {wrong}. Programs run without it.")
    elif sandbox == "auto" and support.installed:
        progress.say(f"{support.problem} Programs run without a sandbox.")
    wrong = _wrong_canary(pool, sandbox=False)
    if wrong is not None:
        raise IsolationError(
            f"answers cannot be verified here: {wrong}.",
            hint="Verify on another machine, or leave verification out.",
        )
    return False


def _wrong_canary(pool: ThreadPoolExecutor, *, sandbox: bool) -> str | None:
    """What should hold and does not, with what happened instead; None where all is well, or was before."""
    if sandbox in _sung:
        return None
    with ExitStack() as stack:
        canaries: tuple[Canary, ...] = BASIC
        if sandbox:
            try:
                canaries += stack.enter_context(confinement())
            except OSError as error:
                return f"it could not be tried ({error.strerror})"
        for canary, wrong in zip(canaries, pool.map(lambda c: c.sings(sandbox=sandbox), canaries), strict=True):
            if wrong is not None:
                happened = f"{wrong.outcome}, {wrong.problem}" if wrong.problem else wrong.outcome
                return f"the check that {canary.name} ended otherwise ({happened})".replace(".)", ")")
    _sung.add(sandbox)
    return None


def _run_all(
    programs: Mapping[str, str], pool: ThreadPoolExecutor, confined: bool, *, at_once: int
) -> Iterator[tuple[str, Execution]]:
    """Outcomes as they come; only a few programs wait at a time, so that an interruption has little to wait for."""
    under_way: dict[Future[Execution], str] = {}
    todo = iter(programs.items())
    try:
        while True:
            while len(under_way) < at_once and (following := next(todo, None)) is not None:
                identity, code = following
                under_way[pool.submit(run_python, code, limits=LIMITS, sandbox=confined)] = identity
            if not under_way:
                return
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                yield under_way.pop(future), future.result()
    finally:
        for future in under_way:
            future.cancel()


def _verification(execution: Execution, isolation: str) -> Verification:
    return Verification(
        passed=execution.passed,
        detail=_detail(execution),
        isolation=isolation,
        tests=execution.tests_run,
        seconds=round(execution.seconds, 3),
    )


def _detail(execution: Execution) -> str:
    if execution.missing_module is not None:
        return f"It needs {execution.missing_module}, and programs are given the standard library alone."
    if execution.problem is not None:
        return execution.problem
    tests = execution.tests_run
    return f"It ran to its end; {tests} test{'' if tests == 1 else 's'} passed."
