"""Files of tasks: read as they stand, refused where they cannot be tested, and every refusal says where."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_distill.errors import InputError
from mlx_distill.evaluation import EvalTask, load_tasks
from mlx_distill.layout import bundled

HEAD = 'format = 1\nkind = "python"\nfamily = "numbers"\n'
TASK = """
[[task]]
id = "triple"
difficulty = "easy"
defines = ["triple"]
prompt = "Write `triple(n)`."
tests = "assert triple(1) == 3"
reference = "triple = lambda n: 3 * n"
"""
SQL = """
[[task]]
id = "names"
difficulty = "easy"
kind = "sql"
prompt = "List the names."
setup = "CREATE TABLE people (name TEXT);"
reference = "SELECT name FROM people;"
[[task.case]]
rows = "INSERT INTO people VALUES ('Ada');"
expected = "Ada"
"""


def written(folder: Path, text: str, name: str = "tasks.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_is_read_as_it_stands(tmp_path: Path) -> None:
    (task, other) = load_tasks(written(tmp_path, HEAD + TASK + SQL))
    assert (task.id, task.family, task.kind, task.defines) == ("triple", "numbers", "python", ("triple",))
    assert (task.test_count, task.objective, task.format) == (1, True, 1)
    assert task.reference_answer == "```python\ntriple = lambda n: 3 * n\n```\n"
    assert (other.kind, other.family, other.test_count, other.case[0].expected) == ("sql", "numbers", 1, "Ada")
    assert EvalTask.model_validate_json(task.to_json()) == task


def test_files_and_folders_are_read_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    written(folder, HEAD + TASK.replace("triple", "b"), "b.toml")
    written(folder, HEAD + TASK.replace("triple", "a"), "a.toml")
    written(folder, "not a task", "README.md")
    single = written(tmp_path, HEAD + TASK)
    assert [task.id for task in load_tasks([single, folder])] == ["triple", "a", "b"]


def test_shipped_tasks_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = bundled("eval")
    assert folder is not None
    assert load_tasks() == load_tasks(folder) == load_tasks([Path("data/eval")])


def test_open_tasks_take_their_texts_from_elsewhere(tmp_path: Path) -> None:
    written(tmp_path, 'format = 1\n[[prompt]]\nid = "p"\nfield = "systems"\ntext = "Say it."\n', "prompts.toml")
    written(tmp_path, "+++\nid = 'p'\nprompt = 'Say it.'\n+++\nIt is said.\n", "p.md")
    head = f'format = 1\nkind = "open"\nprompts = "{tmp_path / "prompts.toml"}"\nanswers = "{tmp_path}"\n'
    (task,) = load_tasks(written(tmp_path, head + '[[task]]\nid = "p"\ndifficulty = "easy"\n'))
    assert (task.prompt, task.family, task.reference_answer) == ("Say it.", "systems", "It is said.")
    assert (task.objective, task.test_count) == (False, 0)


@pytest.mark.parametrize(
    ("text", "says", "line"),
    [
        (HEAD, "no tasks in", None),
        ("", "format: Field required", None),
        ('kind = "python"\nformat = 2\n', "format", None),
        ('format = 1\nkind = "java"\n', "kind", None),
        (HEAD + "[[task]\n", "not valid TOML", 4),
        (HEAD + "x = [" + "[" * 5000, "not valid TOML", None),
        (HEAD + TASK + TASK.replace("`triple(n)`", "other"), "task triple has the same id as the one at", 13),
        (HEAD + TASK + TASK.replace('"triple"', '"other"', 1), "task other has the same prompt as the one at", 13),
        (HEAD + TASK.replace("easy", "hard"), "triple: difficulty", 5),
        (HEAD + TASK.replace('id = "triple"', 'id = "tri ple"'), "tri ple: id", 5),
        (HEAD + TASK.replace('id = "triple"\n', ""), "[[task]] number 1: id", 5),
        (HEAD + TASK.replace("tests", "test"), "triple: test: ", 5),
        (HEAD + TASK.replace("assert triple(1) == 3", "triple(1)"), "needs tests, with an assert", 5),
        (HEAD + TASK.replace("assert triple(1) == 3", "assert triple(1) == = 3"), "tests are not Python", 5),
        (HEAD + TASK.replace('defines = ["triple"]\n', ""), "needs defines", 5),
        (HEAD + TASK.replace("reference = ", "answer = "), "triple: reference", 5),
        (HEAD + TASK + 'colour = "red"\n', "triple: colour", 5),
        (HEAD + SQL.replace("setup", "check"), "needs setup", 5),
        (HEAD + SQL[: SQL.index("[[task.case")], "needs setup, its schema, and a [[task.case]]", 5),
        (HEAD + SQL.replace('"sql"', '"open"'), "neither tests nor wrong answers", 5),
        (HEAD + TASK.replace('"numbers"', "").replace("python", "") + "[task]\n", "not valid TOML", None),
    ],
)
def test_what_cannot_be_is_refused_and_located(tmp_path: Path, text: str, says: str, line: int | None) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_tasks(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    if line is not None:
        assert f"{path}:{line}: " in str(caught.value)


def test_files_that_cannot_be_read_are_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load_tasks(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not UTF-8"):
        load_tasks(tmp_path / "bytes.toml")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match="no tasks in"):
        load_tasks(empty)
    with pytest.raises(InputError, match="no tasks"):
        load_tasks([])
    with pytest.raises(InputError, match=r"same id.*at .*tasks\.toml:5"):
        first = written(tmp_path, HEAD + TASK)
        load_tasks([first, written(tmp_path, HEAD + TASK, "again.toml")])
