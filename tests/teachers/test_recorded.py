"""The recorded teacher answers exactly what was recorded, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_distill.errors import InputError, TeacherError
from mlx_distill.layout import bundled
from mlx_distill.records import Message, Request
from mlx_distill.teachers.base import request_name
from mlx_distill.teachers.recorded import RecordedTeacher


def ask_for(text: str, *, system: str | None = None) -> Request:
    return Request(
        prompt_id="the-prompt",
        family="the-prompt",
        teacher="recorded",
        messages=(Message(role="user", content=text),),
        system=system,
        max_tokens=1,
    )


def write_answer(folder: Path, name: str, prompt: str, answer: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.md"
    path.write_text(f"+++\nid = \"{name}\"\nprompt = '''\n{prompt}\n'''\n+++\n{answer}\n", encoding="utf-8")
    return path


async def test_an_answer_comes_back_to_the_letter(tmp_path: Path) -> None:
    answer = "First.\n\n```python\nx = '''\n+++\n'''  \n```\n\n  Last line, with spaces.  "
    write_answer(tmp_path, "a", "Say it\n\nwith care.", answer)
    reply = await RecordedTeacher(str(tmp_path)).ask(ask_for("Say it\n\nwith care."))
    assert reply.text == answer
    assert (reply.stop, reply.usage.output_tokens) == ("end", 0)


async def test_a_prompt_without_recording_is_named(tmp_path: Path) -> None:
    write_answer(tmp_path, "a", "Say it.", "It.")
    with pytest.raises(TeacherError, match="the-prompt"):
        await RecordedTeacher(str(tmp_path)).ask(ask_for("say it."))


@pytest.mark.parametrize("path", ["data/starter", "data/starter/answers"])
async def test_the_shipped_answers_are_found_from_any_folder(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher = RecordedTeacher(path)
    answers = bundled("starter/answers")
    assert answers is not None
    assert len(teacher) == len(list(answers.glob("*.md")))
    assert teacher.terms().licence == "MIT"


async def test_terms_are_unknown_unless_stated(tmp_path: Path) -> None:
    write_answer(tmp_path / "answers", "a", "p", "x")
    assert RecordedTeacher(str(tmp_path)).terms().licence == "unknown"
    (tmp_path / "TERMS.toml").write_text('licence = "CC0-1.0"\nsummary = "Mine."\n', encoding="utf-8")
    for path in (tmp_path, tmp_path / "answers"):
        terms = RecordedTeacher(str(path)).terms()
        assert (terms.licence, terms.summary, terms.requires_acceptance) == ("CC0-1.0", "Mine.", False)


async def test_jsonl_pairs_and_chat_rows(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text(
        '{"prompt": "one", "answer": "1\\u2028!"}\n\n'
        '{"messages": [{"role": "user", "content": "two"}, {"role": "assistant", "content": "2"}]}\n'
        '{"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "two"},'
        ' {"role": "assistant", "content": "2 under S"}]}\n',
        encoding="utf-8",
    )
    teacher = RecordedTeacher(str(path))
    assert (await teacher.ask(ask_for("one"))).text == "1\u2028!"
    assert (await teacher.ask(ask_for("one", system="anything"))).text == "1\u2028!"
    assert (await teacher.ask(ask_for("two"))).text == "2"
    assert (await teacher.ask(ask_for("two", system="S"))).text == "2 under S"
    assert (await teacher.ask(ask_for("two", system="T"))).text == "2"


async def test_a_recorded_system_text_counts(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text('{"prompt": "p", "answer": "a", "system": "S"}\n', encoding="utf-8")
    with pytest.raises(TeacherError):
        await RecordedTeacher(str(path)).ask(ask_for("p"))


@pytest.mark.parametrize(
    ("content", "line", "problem"),
    [
        ('{"prompt": "p", "answer": "a"}\n{"prompt": "q"', 2, "JSON"),
        ('{"prompt": "p", "answer": "a"}\n{"prompt": "q", "anwser": "a"}\n', 2, "answer"),
        ('{"prompt": "p", "answer": "  "}\n', 1, "empty"),
        ('["p", "a"]\n', 1, "row is"),
        ('{"messages": [{"role": "user", "content": "p"}]}\n', 1, "assistant"),
        ('{"messages": [{"role": "assistant", "content": "p"}]}\n', 1, "assistant"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, content: str, line: int, problem: str) -> None:
    path = tmp_path / "record.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=problem) as caught:
        RecordedTeacher(str(path))
    assert caught.value.line == line


def test_two_answers_to_one_prompt_are_refused_with_both_places(tmp_path: Path) -> None:
    write_answer(tmp_path, "a", "p", "one")
    write_answer(tmp_path, "b", "p", "two")
    with pytest.raises(InputError) as caught:
        RecordedTeacher(str(tmp_path))
    assert "a.md" in str(caught.value)
    assert "b.md" in str(caught.value)


@pytest.mark.parametrize(
    "content", ["no front matter", '+++\nid = "a"\n+++\nx', "+++\nid = \n+++\nx", "+++\nid = 'a'\n"]
)
def test_bad_front_matter_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "bad.md").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"bad\.md"):
        RecordedTeacher(str(tmp_path))


@pytest.mark.parametrize("name", ["nowhere", "nowhere.jsonl"])
def test_a_missing_record_says_what_ships(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="recorded:data/starter"):
        RecordedTeacher(str(tmp_path / name))


def test_an_edited_answer_changes_the_revision_and_its_place_does_not(tmp_path: Path) -> None:
    write_answer(tmp_path / "one", "a", "p", "x")
    write_answer(tmp_path / "two", "b", "p", "x")
    one, two = RecordedTeacher(str(tmp_path / "one")), RecordedTeacher(str(tmp_path / "two"))
    assert one.revision == two.revision
    write_answer(tmp_path / "two", "b", "p", "y")
    assert RecordedTeacher(str(tmp_path / "two")).revision != one.revision
    assert request_name(one) == f"recorded:{tmp_path / 'one'}@{one.revision}"
