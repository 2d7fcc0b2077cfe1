"""Tasks: what a model is asked, and how its answer is tested. Some evaluate; others are asked when collecting.

A file of tasks is TOML: `format = 1`, `kind` and `family` for all of its tasks, and `[[task]]` tables.

- "python": `defines` (names that the answer has to define), `tests` (Python, see `python_tests`), `reference`, `wrong`
  (near misses that the tests have to fail), and `setup` (code that stands before the answer).
- "sql": `setup` (the schema), `[[task.case]]` tables with `rows` (statements that fill it) and `expected` (what the
  answer's query shall give), `ordered`, `reference`, `wrong`, and `check` (the query whose rows count where the answer
  changes tables).
- "open": prompts without hidden tests, for judges. Their text may come from a prompt file, and their reference from
  recorded answers: `prompts` and `answers` at the head of the file.

Every task has an `id`, a `difficulty` ("easy" or "medium"), a `prompt` and a `reference`. A whole file:

    format = 1
    kind = "python"
    family = "strings"

    [[task]]
    id = "count-vowels"
    difficulty = "easy"
    prompt = "Write a Python function `count_vowels(text)` that counts the letters a, e, i, o and u, in either case."
    defines = ["count_vowels"]
    tests = '''
    assert count_vowels("") == 0
    assert count_vowels("Banana, EGG") == 4
    '''
    reference = '''
    def count_vowels(text):
        return sum(letter in "aeiou" for letter in text.lower())
    '''
    wrong = ['''
    def count_vowels(text):
        return sum(letter in "aeiou" for letter in text)
    ''']

Indented like this it would not be Python: the lines of a file begin at its margin.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import Field, ValidationError, field_validator, model_validator

from mlx_distill.errors import InputError
from mlx_distill.evaluation.python_tests import Step, read_steps
from mlx_distill.layout import bundled, explain, find_input
from mlx_distill.prompts import fold, load_prompts
from mlx_distill.records import Prompt, Record
from mlx_distill.teachers.recorded import recordings

R = TypeVar("R", bound=Record)

Kind = Literal["python", "sql", "open"]
Difficulty = Literal["easy", "medium"]

BUILTIN: Literal["builtin"] = "builtin"

_NOT_FOR_TRAINING = "It is what  compare --eval builtin  asks. Collect on tasks of your own, in the same format."

_TOML_LINE = re.compile(r" \(at line (\d+), column \d+\)$")
_HEADER = re.compile(r"^\s*\[\[\s*task\s*\]\]", re.MULTILINE)


class SqlCase(Record):
    """One filling of a task's tables.

    Attributes:
        rows: Statements that fill them.
        expected: The rows that count, one a line, cells with `|` between them, NULL for no value.
    """

    rows: str = ""
    expected: str = ""


class EvalTask(Record):
    """One task.

    Attributes:
        family: What it is about, such as "strings"; reports group by it.
        prompt: What the model is asked, complete by itself.
        defines: Names that an answer in Python has to define.
        setup: Python: code before the answer. SQL: the schema.
        tests: Python; never given to the model.
        case: SQL: one test each.
        check: SQL: the query whose rows count, where the answer changes tables.
        ordered: SQL: whether the order of the rows matters.
        reference: A solution that passes; of an open task an answer in Markdown.
        wrong: Near misses, each of which fails.
    """

    format: Literal[1] = 1
    id: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    family: str = Field(min_length=1)
    difficulty: Difficulty
    kind: Kind
    prompt: str = Field(min_length=1)
    defines: tuple[str, ...] = ()
    setup: str = ""
    tests: str = ""
    case: tuple[SqlCase, ...] = ()
    check: str = ""
    ordered: bool = False
    reference: str = Field(min_length=1)
    wrong: tuple[str, ...] = ()

    @field_validator("prompt", "reference", mode="after")
    @classmethod
    def _stripped(cls, text: str) -> str:
        return text.strip("\n")

    @model_validator(mode="after")
    def _can_be_tested(self) -> Self:
        if self.kind == "python" and not self.defines:
            raise ValueError("a Python task needs defines, the names that an answer defines")
        if self.kind == "python" and self.test_count == 0:
            raise ValueError("a Python task needs tests, with an assert in them")
        if self.kind == "sql" and not (self.setup.strip() and self.case):
            raise ValueError("a SQL task needs setup, its schema, and a [[task.case]]")
        if self.kind == "open" and (self.tests or self.case or self.wrong):
            raise ValueError("an open task has neither tests nor wrong answers")
        return self

    @property
    def steps(self) -> list[Step]:
        """The tests of a Python task, and what stands between them."""
        try:
            return read_steps(self.tests)
        except SyntaxError as error:
            raise ValueError(f"tests are not Python: {error.msg}, line {error.lineno} of them") from None

    @property
    def test_count(self) -> int:
        """Its hidden tests: asserts or cases; 0 for an open task."""
        return len(self.case) if self.kind == "sql" else sum(step.is_test for step in self.steps)

    @property
    def objective(self) -> bool:
        """Whether hidden tests decide; only such tasks count for pass@k."""
        return self.kind != "open"

    def answer(self, code: str) -> str:
        """Code as a model would answer with it: in a fenced block."""
        return f"```{self.kind}\n{code.strip()}\n```\n"

    @property
    def reference_answer(self) -> str:
        """The reference solution as an answer, in Markdown."""
        return self.reference if self.kind == "open" else self.answer(self.reference)

    @property
    def wrong_answers(self) -> tuple[str, ...]:
        """The near misses, likewise."""
        return tuple(self.answer(code) for code in self.wrong)


class _TaskFile(Record):
    format: Literal[1]
    kind: Kind
    family: str | None = None
    prompts: str | None = None
    answers: str | None = None
    task: tuple[dict[str, Any], ...] = ()


def load_tasks(paths: Path | Sequence[Path] | Literal["builtin"] = BUILTIN) -> list[EvalTask]:
    """Read tasks.

    Args:
        paths: Files and folders of `.toml` files; "builtin" stands for `data/eval`, which ships with the package.

    Returns:
        In the order of the files, those of a folder by name; at least one.

    Raises:
        InputError: A file is missing, malformed, or holds a task that an earlier one has; says where.
    """
    if isinstance(paths, str):
        folder = bundled("eval")
        if folder is None:
            raise InputError("the tasks that ship with mlx-distill are missing.", hint="Install it again.")
        paths = [folder]
    tasks: list[EvalTask] = []
    seen: dict[tuple[str, str], str] = {}
    for path in _files([paths] if isinstance(paths, Path) else paths):
        for task, line in _read_file(path):
            for what, key in (("id", task.id), ("prompt", fold(task.prompt))):
                if (first := seen.get((what, key))) is not None:
                    raise InputError(
                        f"task {task.id} has the same {what} as the one at {first}.",
                        path=path,
                        line=line,
                        hint="Take one of the two out.",
                    )
                seen[what, key] = f"{path}:{line}" if line else str(path)
            tasks.append(task)
    if not tasks:
        named = [paths] if isinstance(paths, Path) else paths
        raise InputError(f"no tasks in {', '.join(map(str, named)) or 'no file'}.", hint="Shipped ones: data/eval")
    return tasks


def as_prompts(tasks: Iterable[EvalTask]) -> list[Prompt]:
    """The tasks as prompts that contenders can be asked. Each is a family of its own: none is another's variation."""
    return [Prompt(id=task.id, family=task.id, text=task.prompt, field=task.family) for task in tasks]


def is_task_file(path: Path) -> bool:
    """Whether a file holds tasks, not bare prompts. Of one that cannot be read this is False; its reader says why."""
    path = find_input(path)
    if path.suffix.lower() != ".toml":
        return False
    try:
        return "task" in tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError):
        return False


def read_prompts(path: Path, *, modifiers: bool = True) -> list[Prompt]:
    """The prompts of a file of either kind: those of its tasks, without anything else of them, or its own.

    Args:
        modifiers: As for `load_prompts`.

    Raises:
        InputError: As `load_tasks` and `load_prompts`.
    """
    return as_prompts(load_tasks(path)) if is_task_file(path) else load_prompts(path, modifiers=modifiers)


def refuse_builtin(path: Path, prompts: Iterable[Prompt]) -> None:
    """Refuse to train on the tasks that ship with the package: they are there to evaluate.

    Args:
        path: What the prompts were read from.

    Raises:
        InputError: The file is one of theirs, or a prompt is word for word one of theirs; says which.
    """
    folder = bundled("eval")
    if folder is None:
        return
    if find_input(path).resolve().is_relative_to(folder.resolve()):
        raise InputError("belongs to the evaluation set, which is not for training.", path=path, hint=_NOT_FOR_TRAINING)
    # The texts of open tasks are held-out prompts, which the collection leaves out by itself.
    known = {fold(task.prompt): task.id for task in load_tasks() if task.objective}
    for prompt in prompts:
        if (task := known.get(fold(prompt.text))) is not None:
            raise InputError(
                f"prompt {prompt.id} is the task {task} of the evaluation set, which is not for training.",
                path=path,
                hint=_NOT_FOR_TRAINING,
            )


def _files(paths: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for path in map(find_input, paths):
        files += sorted(path.glob("*.toml")) if path.is_dir() else [path]
    return files


def _read_file(path: Path) -> list[tuple[EvalTask, int | None]]:
    """The tasks of a file with the line that each starts on, where that can be told."""
    text = _text(path)
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = _TOML_LINE.search(str(error))
        at = int(place[1]) if place else text.count("\n") + 1
        raise InputError(f"not valid TOML: {_TOML_LINE.sub('', str(error))}.", path=path, line=at) from None
    except RecursionError:
        raise InputError("not valid TOML: nested too deeply.", path=path) from None
    file = _parse(_TaskFile, tree, path=path, line=None, what="the file")
    headers = [text.count("\n", 0, match.end()) + 1 for match in _HEADER.finditer(text)]
    # A header inside a task's own text would shift the count; then no line is better than a wrong one.
    lines: list[int | None] = [*headers] if len(headers) == len(file.task) else [None] * len(file.task)
    texts = _borrowed(file)
    tasks = []
    for number, (table, line) in enumerate(zip(file.task, lines, strict=True), start=1):
        identity = table.get("id")
        family = {} if file.family is None else {"family": file.family}
        values = {"kind": file.kind, **family, **texts.get(str(identity), {}), **table}
        what = str(identity) if identity else f"[[task]] number {number}"
        tasks.append((_parse(EvalTask, values, path=path, line=line, what=what), line))
    return tasks


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise InputError("no such file.", path=path, hint="The tasks that ship with mlx-distill: data/eval") from None
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: byte {error.start}.", path=path) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}.", path=path) from None


def _borrowed(file: _TaskFile) -> dict[str, dict[str, str]]:
    """By id, the text of each prompt in the file that a file of tasks names, and the recorded answer to it."""
    if file.prompts is None:
        return {}
    answers = {}
    if file.answers is not None:
        answers = {found.conversation[-1][1]: found.answer for found in recordings(find_input(Path(file.answers)))}
    texts: dict[str, dict[str, str]] = {}
    for prompt in load_prompts(Path(file.prompts), modifiers=False):
        texts[prompt.id] = {"prompt": prompt.text, "family": prompt.field}
        if prompt.text in answers:
            texts[prompt.id]["reference"] = answers[prompt.text]
    return texts


def _parse(record: type[R], values: dict[str, Any], *, path: Path, line: int | None, what: str) -> R:
    try:
        return record.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{what}: {explain(error)}.", path=path, line=line) from None
