"""Runs as a script in the child process: limits itself, runs the code, and reports on a pipe how that went.

Python runs as `__main__`. Afterwards the driver runs the tests that the program defines and has not run itself:
`test_*` functions without parameters, classes derived from `unittest.TestCase`, and plain `Test*` classes.
SQL runs statement by statement on an empty in-memory SQLite database; the rows of its queries are printed.

Standard library only, and nothing of this package: the interpreter is started without site-packages.
"""

from __future__ import annotations

import ast
import builtins
import functools
import json
import os
import resource
import site
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import unittest

_COUNTER = "__counted_test__"


class Report:
    """Sends events to the supervisor, each with the token that tells them from what a program might write there."""

    def __init__(self, handle: int, token: str) -> None:
        self._handle, self._token, self._process = handle, token, os.getpid()

    def send(self, event: str, **fields: Any) -> None:
        """Send one event; a forked copy of this process sends none."""
        if self.is_ours():
            line = json.dumps({"token": self._token, "event": event, **fields}) + "\n"
            os.write(self._handle, line.encode())

    def is_ours(self) -> bool:
        """Whether this process is the driver itself, not one that the program forked."""
        return os.getpid() == self._process


class Tests:
    """Which tests ran, whoever ran them, and how they ended."""

    def __init__(self) -> None:
        self.run: set[str] = set()
        self.failed: set[str] = set()
        self.skipped: set[str] = set()
        self.out_of_memory = False
        self._counted: set[Callable[..., Any]] = set()

    def counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorates the program's test functions."""
        name = function.__qualname__

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.run.add(name)
            self.failed.add(name)
            try:
                result = function(*args, **kwargs)
            except MemoryError:
                self.out_of_memory = True
                raise
            self.failed.discard(name)
            return result

        self._counted.add(call)
        return call

    def watch_unittest(self) -> None:
        """Count what any runner of `unittest` runs from now on."""
        import unittest

        original = unittest.TestCase.run

        def run(case: unittest.TestCase, result: unittest.TestResult | None = None) -> unittest.TestResult | None:
            if isinstance(case, unittest.FunctionTestCase):
                return original(case, result)
            before = _bad(result)
            result = original(case, result)
            if result is not None:
                self._note(case.id(), result, _bad(result) > before)
            return result

        unittest.TestCase.run = run  # type: ignore[assignment, method-assign]

    def _note(self, name: str, result: unittest.TestResult, failed: bool) -> None:
        if result.skipped and result.skipped[-1][0].id() == name:
            self.skipped.add(name)
            return
        self.run.add(name)
        if failed:
            self.failed.add(name)
            last_errors = [text.rstrip().rpartition("\n")[2] for _, text in result.errors[-1:]]
            self.out_of_memory |= any(line.startswith("MemoryError") for line in last_errors)

    def run_missed(self, module: types.ModuleType) -> None:
        """Run the tests that the program defines and has not run."""
        defined = [(name, value) for name, value in vars(module).items() if not name.startswith("__")]
        functions: list[Callable[[], Any]] = []
        cases: list[type[unittest.TestCase]] = []
        for name, value in defined:
            if isinstance(value, types.FunctionType) and name.startswith("test_"):
                functions += self._missed_function(value)
            elif isinstance(value, type) and value.__module__ == "__main__":
                if _is_test_case(value):
                    cases += [value] * (not any(f"__main__.{value.__qualname__}." in test for test in self.run))
                elif name.startswith("Test"):
                    functions += self._missed_methods(value)
        if functions or cases:
            self._run_all(functions, cases)

    def _missed_function(self, function: types.FunctionType) -> list[Callable[[], Any]]:
        name = function.__qualname__
        if name in self.run:
            return []
        if _needs_arguments(function):
            self.skipped.add(name)
            return []
        return [function if function in self._counted else self.counted(function)]

    def _missed_methods(self, kind: type) -> list[Callable[[], Any]]:
        missed: list[Callable[[], Any]] = []
        for name, method in vars(kind).items():
            if name.startswith("test_") and isinstance(method, types.FunctionType) and "__init__" not in vars(kind):
                missed.append(self.counted(_bound(kind, method)))
        return missed

    def _run_all(self, functions: list[Callable[[], Any]], cases: list[type[unittest.TestCase]]) -> None:
        import inspect
        import unittest

        def awaited(function: Callable[[], Any]) -> Callable[[], Any]:
            if not inspect.iscoroutinefunction(inspect.unwrap(function)):
                return function
            import asyncio

            return lambda: asyncio.run(function())

        suite = unittest.TestSuite(unittest.FunctionTestCase(awaited(f)) for f in functions)
        for case in cases:
            suite.addTest(unittest.defaultTestLoader.loadTestsFromTestCase(case))
        before = len(self.failed)
        result = unittest.TextTestRunner(stream=sys.stderr).run(suite)
        if not result.wasSuccessful() and len(self.failed) == before:
            # What fails outside a test, such as in setUpClass, or after an await, has not been counted.
            self.failed.add("outside the tests")


def _bad(result: unittest.TestResult | None) -> int:
    if result is None:
        return 0
    return len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)


def _is_test_case(kind: type) -> bool:
    unittest = sys.modules.get("unittest")
    return unittest is not None and issubclass(kind, unittest.TestCase)


def _needs_arguments(function: types.FunctionType) -> bool:
    inner = getattr(function, "__wrapped__", function)
    if not isinstance(inner, types.FunctionType):
        return False
    return inner.__code__.co_argcount > len(inner.__defaults__ or ()) or inner.__code__.co_kwonlyargcount > 0


def _bound(kind: type, method: types.FunctionType) -> Callable[[], Any]:
    @functools.wraps(method)
    def call() -> Any:
        instance = kind()
        if callable(setup := getattr(instance, "setup_method", None)):
            setup()
        return method(instance)

    return call


def run_python(path: Path, report: Report) -> None:
    """Run a file as `__main__`, then its tests.

    Raises:
        SystemExit: As the program ended, or with 1 if tests failed.
    """
    tests = Tests()
    text = path.read_bytes()
    sys.excepthook = functools.partial(_show, report)
    if b"unittest" in text:
        tests.watch_unittest()
    tree: Any = compile(text, str(path), "exec", ast.PyCF_ONLY_AST)
    expected = _count_tests(tree)
    setattr(builtins, _COUNTER, tests.counted)
    site.setquit()
    module = types.ModuleType("__main__")
    module.__file__ = str(path)
    module.__builtins__ = builtins  # type: ignore[attr-defined]
    sys.modules["__main__"] = module
    sys.argv = [str(path)]
    stop: SystemExit | None = None
    try:
        exec(compile(tree, str(path), "exec", dont_inherit=True), vars(module))
    except SystemExit as error:
        stop = error
    status = stop.code if stop is not None else None
    if not report.is_ours():
        raise SystemExit(status)
    missing = [name for name in expected if name not in vars(module)] if stop is not None else []
    if not status:
        tests.run_missed(module)
    report.send(
        "done",
        run=len(tests.run),
        failed=len(tests.failed),
        skipped=len(tests.skipped),
        missing=len(missing),
        out_of_memory=tests.out_of_memory,
    )
    raise SystemExit(status if status or not tests.failed else 1)


def _count_tests(tree: ast.Module) -> list[str]:
    """Decorate the test functions of a module so that their calls are counted.

    Returns:
        The names of all tests that the module's top level defines if it runs to its end.
    """
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            names.append(node.name)
            counter = ast.copy_location(ast.Name(_COUNTER, ast.Load()), node)
            node.decorator_list.insert(0, counter)
        elif isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith("TestCase") for base in node.bases):
            names.append(node.name)
    return names


def _show(report: Report, kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    """Print what ended the program as the interpreter would, without the driver's own frames."""
    module = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    report.send("error", type=kind.__name__, message=str(error)[:300], module=module)
    shown = traceback.TracebackException(kind, error, trace)
    part: traceback.TracebackException | None = shown
    while part is not None:
        part.stack = traceback.StackSummary.from_list([f for f in part.stack if f.filename != __file__])
        part = part.__cause__ or part.__context__
    sys.stderr.write("".join(shown.format()))


def run_sql(path: Path, report: Report) -> None:
    """Run a script on an empty in-memory SQLite database and print the rows of its queries, tab-separated.

    Raises:
        SystemExit: With 1 where a statement fails.
    """
    import sqlite3

    connection = sqlite3.connect(":memory:", isolation_level=None)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)  # ATTACH and VACUUM INTO would write files
    done = 0
    for statement in _statements(path.read_text(encoding="utf-8", errors="replace")):
        try:
            for row in connection.execute(statement):
                sys.stdout.write("\t".join("NULL" if value is None else str(value) for value in row) + "\n")
        except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError) as error:
            report.send("error", type=type(error).__name__, message=str(error)[:300], module=None)
            sys.stderr.write(f"statement {done + 1}: {type(error).__name__}: {error}\n")
            raise SystemExit(1) from None
        done += 1
    connection.close()
    report.send("done", run=0, failed=0, skipped=0, missing=0, out_of_memory=False, statements=done)


def _statements(script: str) -> Iterator[str]:
    import sqlite3

    pending = ""
    for piece in script.split(";"):
        pending += piece + ";"
        if sqlite3.complete_statement(pending):
            if pending.strip(" \t\r\n;"):
                yield pending
            pending = ""
    if pending.strip(" \t\r\n;"):
        yield pending.removesuffix(";")


LANGUAGES: dict[str, Callable[[Path, Report], None]] = {"python": run_python, "sql": run_sql}


def limit_self(limits: dict[str, int]) -> None:
    """Set resource limits on this process, soft and hard; names that the platform lacks or refuses are passed over.

    Args:
        limits: By their name in `resource`, such as RLIMIT_CPU.
    """
    for name, value in limits.items():
        which = getattr(resource, name, None)
        if which is None:
            continue
        _, hard = resource.getrlimit(which)
        top = value if hard == resource.RLIM_INFINITY else min(value, hard)
        # Beyond the soft limit on processor time comes SIGXCPU, which can be ignored; beyond the hard one, SIGKILL.
        ceiling = top + 1 if name == "RLIMIT_CPU" and hard in (resource.RLIM_INFINITY, top + 1) else top
        try:
            resource.setrlimit(which, (top, ceiling))
        except (ValueError, OSError):  # macOS refuses some
            continue


def main() -> None:
    """Read the job from standard input and do it."""
    job = json.load(sys.stdin)
    report = Report(job["report"], job["token"])
    os.set_inheritable(job["report"], False)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.environ.pop("PYTHONHASHSEED", None)
    limit_self(job["limits"])
    report.send("started")
    LANGUAGES[job["language"]](Path(job["file"]), report)


if __name__ == "__main__":
    main()
