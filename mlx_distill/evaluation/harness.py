"""Runs in the child process, where an answer's Python meets the expressions of its tests; what they see is reported.

`program` in `mlx_distill.evaluation.python_tests` takes the text of this file, and adds a call of `main`. What the
tests expect is not here: the calling process holds it, and compares. `encode` is the only thing that both use.

Standard library only, and nothing of this package: the interpreter is started without site-packages.
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterable
from typing import Any

_MOST_CHARACTERS = 4000
_SHOWN_CHARACTERS = 80
_ANSWER = "answer"
#: What the parser raises on source that is none, or nested beyond its means.
_NO_PARSE = (SyntaxError, ValueError, RecursionError, MemoryError)


def encode(value: Any) -> str:
    """A text that two values share if they are equal, for values made of Python's plain types; ASCII.

    As with `==`, 1 is 1.0 and True, a named tuple is a tuple, and the order of sets and dictionaries is no matter.
    Unlike it, NaN is NaN. A value of any other type equals no literal.

    Raises:
        RecursionError: It contains itself.
    """
    text = _encode(value)
    return text if len(text) <= _MOST_CHARACTERS else "#" + hashlib.sha256(text.encode()).hexdigest()


def _encode(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, str):
        return json.dumps(str.__str__(value))
    if isinstance(value, bytes | bytearray):
        return f"b'{value.hex()}'"
    if isinstance(value, list | tuple):
        first, last = "[]" if isinstance(value, list) else "()"
        return first + ",".join(map(_encode, value)) + last
    if isinstance(value, set | frozenset):
        return f"set({','.join(sorted(map(_encode, value)))})"
    if isinstance(value, dict):
        return f"dict({','.join(sorted(f'{_encode(key)}:{_encode(item)}' for key, item in value.items()))})"
    return f"<{type(value).__name__}>"


def _number(value: float) -> str:
    if isinstance(value, int):
        return hex(value)
    if math.isfinite(value):
        return hex(int(value)) if value.is_integer() else value.hex()
    return str(float(value))


def raises(kind: type[BaseException], function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a call raises an exception of this kind; any other kind goes through."""
    try:
        function(*arguments)
    except kind:
        return True
    return False


class _Line:
    """Reports a line at a time, past whatever the answer makes of `sys.stdout`."""

    def __init__(self, mark: str) -> None:
        self._mark, self._out = mark, os.dup(1)

    def send(self, kind: str, at: int = -1, value: str = "", shown: str = "") -> None:
        """Send one line."""
        # The line feed before it: the answer may have printed half a line.
        os.write(self._out, f"\n{self._mark}{json.dumps([kind, at, value, shown])}\n".encode())


def _shown(make: Callable[[], str]) -> str:
    """What a hostile object says of itself, if it says anything."""
    try:
        # A lone surrogate would make the line of the report unreadable.
        return str(make())[:_SHOWN_CHARACTERS].encode(errors="backslashreplace").decode()
    except Exception:  # noqa: BLE001 - its own code
        return "something that cannot be shown"


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {_shown(lambda: str(error))}".removesuffix(": ")


def _chosen(blocks: list[str], names: Iterable[str]) -> tuple[str, bool]:
    """The code to run, and whether it defines all names at its top level.

    It is made of the first blocks that parse and define all names together; else of all blocks.
    """
    wanted = set(names)
    kept: list[str] = []
    for block in blocks:
        try:
            tree = ast.parse(block)
        except _NO_PARSE:
            continue
        kept.append(block)
        wanted -= _defined(tree)
        if not wanted:
            return "\n".join(kept), True
    return "\n".join(blocks), False


def _defined(tree: ast.Module) -> set[str]:
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def main(job: dict[str, Any]) -> None:
    """Run an answer, then the steps of its tests, and report on standard output.

    Args:
        job: `mark` (begins each line of the report), `setup` (code that stands before the answer), `blocks` (of the
            answer), `fenced` (whether they were marked as code), `names` (what it must define), `steps` (pairs of a
            kind and source, see `python_tests.Step`).
    """
    line = _Line(job["mark"])
    warnings.simplefilter("ignore")
    module = types.ModuleType(_ANSWER)
    sys.modules[_ANSWER] = module
    space = vars(module)
    exec(compile(job["setup"], "setup.py", "exec", dont_inherit=True), space)
    before = {name: space.get(name) for name in job["names"]}
    source, defines = _chosen(job["blocks"], job["names"])
    if not defines and not job["fenced"]:
        line.send("missing", shown="a function")  # prose can be Python by accident
        return
    try:
        code = compile(source, "answer.py", "exec", dont_inherit=True)
    except _NO_PARSE as error:
        line.send("unparsed", shown=_described(error))
        return
    line.send("parsed")
    try:
        exec(code, space)
    except SystemExit:
        pass  # what it has defined by now is there
    except MemoryError:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever an answer raises
        line.send("broken", shown=_described(error))
        return
    missing = [name for name in job["names"] if space.get(name) is before[name]]
    if missing:
        line.send("missing", shown=", ".join(missing))
        return
    _run_steps(job["steps"], {**space, "raises": raises}, line)


def _run_steps(steps: list[tuple[str, str]], space: dict[str, Any], line: _Line) -> None:
    for at, (kind, source) in enumerate(steps):
        try:
            if kind == "see":
                value = eval(compile(source, "tests.py", "eval", dont_inherit=True), space)
                line.send("saw", at, encode(value), _shown(lambda value=value: repr(value)))  # type: ignore[misc]
            else:
                exec(compile(source, "tests.py", "exec", dont_inherit=True), space)
                if kind == "try":
                    line.send("saw", at, encode(None))
        except MemoryError:
            raise
        except BaseException as error:  # noqa: BLE001 - whatever an answer raises
            line.send("raised", at, shown=_described(error))
    line.send("end")
