"""Small tasks that the tests of scoring answer, and limits that end a program soon."""

from __future__ import annotations

from mlx_distill.evaluation import EvalTask
from mlx_distill.evaluation.scoring import LIMITS
from mlx_distill.evaluation.tasks import SqlCase

QUICK = LIMITS.model_copy(update={"seconds": 2.0, "cpu_seconds": 2, "memory_bytes": 256 << 20, "processes": 16})

TRIPLE = EvalTask(
    id="triple",
    family="numbers",
    difficulty="easy",
    kind="python",
    prompt="Write a Python function `triple(n)`.",
    defines=("triple",),
    tests="assert triple(7) == 21\nassert triple(-2) == -6\nassert triple(0) == 0\n",
    reference="def triple(n):\n    return 3 * n",
)

NAMES = EvalTask(
    id="names",
    family="sql",
    difficulty="easy",
    kind="sql",
    prompt="List the names in `people(name, age)`.",
    setup="CREATE TABLE people (name TEXT, age INTEGER);",
    case=(
        SqlCase(rows="INSERT INTO people VALUES ('Ada', 36), ('Bob', NULL);", expected="Ada\nBob"),
        SqlCase(rows="INSERT INTO people VALUES ('Cy', 1);", expected="Cy"),
    ),
    reference="SELECT name FROM people;",
)


def fenced(code: str, language: str = "python") -> str:
    """Code in a Markdown block."""
    return f"Here it is:\n\n```{language}\n{code}\n```\n"
