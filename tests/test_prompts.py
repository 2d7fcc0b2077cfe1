"""Prompt files: what they expand to, and how each mistake in one is told."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distill.errors import InputError
from mlx_distill.prompts import fold, load_prompts, write_prompts
from mlx_distill.records import Prompt

TOML = """\
format = 1

[modifiers]
tests = "Include tests."
robust = "  Make it robust. "

[[prompt]]
id = "sort-words"
field = "algorithms"
modifiers = ["robust", "tests"]
text = '''

Sort words.
By length.
'''

[[prompt]]
id = "explain-heap"
text = "Explain a heap."
"""


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_toml_expands_each_base_with_its_modifiers(tmp_path: Path) -> None:
    base, robust, tests, heap = load_prompts(write(tmp_path, "p.toml", TOML))
    assert base == Prompt(id="sort-words", family="sort-words", field="algorithms", text="Sort words.\nBy length.")
    assert robust == Prompt(
        id="sort-words--robust",
        family="sort-words",
        field="algorithms",
        modifier="robust",
        text="Sort words.\nBy length.\n\nMake it robust.",
    )
    assert tests.id == "sort-words--tests"
    assert (heap.id, heap.family, heap.field, heap.modifier) == ("explain-heap", "explain-heap", "general", None)


def test_modifiers_can_be_left_out(tmp_path: Path) -> None:
    path = write(tmp_path, "p.toml", TOML)
    assert [p.id for p in load_prompts(path, modifiers=False)] == ["sort-words", "explain-heap"]
    write_prompts(tmp_path / "p.jsonl", load_prompts(path))
    assert [p.id for p in load_prompts(tmp_path / "p.jsonl", modifiers=False)] == ["sort-words", "explain-heap"]


def test_the_shipped_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    prompts = load_prompts(Path("data/prompts/coding.toml"))
    heldout = load_prompts(Path("data/prompts/heldout.toml"))
    assert (len(prompts), len({p.family for p in prompts})) == (104, 32)
    assert [p.id for p in heldout] == [
        "balanced-binary-tree",
        "connection-pool",
        "sql-window-functions",
        "ttl-cache-decorator",
    ]
    assert not {fold(p.text) for p in heldout} & {fold(p.text) for p in prompts}


def test_plain_text_ids_depend_on_the_text_alone(tmp_path: Path) -> None:
    one = load_prompts(write(tmp_path, "a.txt", "\ufefffirst \r\n\r\n  second\u2028still second"))
    two = load_prompts(write(tmp_path, "b", "zero\nsecond\u2028still second\nfirst\n"))
    assert [p.text for p in one] == ["first", "second\u2028still second"]
    assert [p.id for p in one] == [two[2].id, two[1].id]
    assert all(p.family == p.id for p in one)


def test_jsonl_takes_three_kinds_of_rows(tmp_path: Path) -> None:
    rows = [
        {"id": "own", "text": " own text ", "field": "sql"},
        {"prompt": "bare", "completion": "not needed"},
        {"prompt": "named", "id": "given", "family": "kin"},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "chat"}]},
        {"messages": [{"role": "user", "content": "answered"}, {"role": "assistant", "content": "x"}]},
    ]
    path = write(tmp_path, "p.jsonl", "\n\n".join(map(json.dumps, rows)) + "\n")
    own, bare, named, chat, answered = load_prompts(path)
    assert own == Prompt(id="own", family="own", text="own text", field="sql")
    assert bare.text == "bare"
    assert (named.id, named.family) == ("given", "kin")
    assert (chat.text, chat.system) == ("chat", "S")
    assert (answered.text, answered.system) == ("answered", None)


@pytest.mark.parametrize(
    ("name", "content", "line", "words"),
    [
        ("p.toml", "format = 1\n[[prompt]]\nid = 'a'\ntext = \n", 4, "column 8"),
        ("p.toml", "format = 1\n[[prompt]]\nid = 'a'\ntext = '''\n", 5, "end of file"),
        ("p.toml", "format = 1\n\n[[prompt]]\nid = 'a'\ntxet = 'b'\n", 3, "unknown key txet (did you mean text?)"),
        ("p.toml", "format = 1\npromt = []\n", None, "unknown key promt (did you mean prompt?)"),
        ("p.toml", "format = 2\n", None, "format"),
        ("p.toml", "[[prompt]]\nid = 'a'\ntext = 'b'\n", None, "format is missing"),
        ("p.toml", "format = 1\n[[prompt]]\nid = 'a'\n", 2, "number 1: text is missing"),
        ("p.toml", "format = 1\n[[prompt]]\nid = 'a'\ntext = '  '\n", 2, "a: text"),
        ("p.toml", "format = 1\n[[prompt]]\nid = 'a b'\ntext = 'c'\n", 2, "a b: id"),
        ("p.toml", "format = 1\n[[prompt]]\nid = 'a'\ntext = 'c'\nmodifiers = ['x']\n", 2, "unknown modifier 'x'"),
        ("p.toml", "format = 1\n", None, "no prompts"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', 2, "JSON"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"prompt": "\\ud800"}\n', 3, "JSON"),
        ("p.jsonl", '{"prompt": "a", "promt": 1}\n', 1, "unknown key promt"),
        ("p.jsonl", '{"prompt": 3}\n', 1, "prompt"),
        ("p.jsonl", '{"prompt": "  "}\n', 1, "text"),
        ("p.jsonl", '{"id": "a"}\n', 1, "text is missing"),
        ("p.jsonl", '"a"\n', 1, "expected an object"),
        ("p.jsonl", '{"messages": []}\n', 1, "messages"),
        ("p.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}\n', 1, "one user turn"),
        ("p.txt", b"good\nb\xe4d\n", 2, "UTF-8"),
        ("p.txt", " \n\n", None, "empty"),
        ("p.toml", "", None, "empty"),
        ("p.csv", "a,b\n", None, "Known kinds"),
    ],
)
def test_a_mistake_is_told_with_its_place(
    tmp_path: Path, name: str, content: str | bytes, line: int | None, words: str
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(InputError) as caught:
        load_prompts(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.line == line


def test_no_file_and_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file.\n.*coding\.toml"):
        load_prompts(tmp_path / "nowhere.toml")
    with pytest.raises(InputError, match="is a folder"):
        load_prompts(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "first", "second"),
    [
        ("p.txt", "Sort words.\nother\n sort\tWORDS. \n", 1, 3),
        ("p.jsonl", '{"id": "a", "text": "b"}\n{"id": "a", "text": "c"}\n', 1, 2),
        ("p.toml", TOML + "[[prompt]]\nid = 'x'\ntext = 'sort words. by LENGTH.'\n", 7, 20),
        ("p.toml", TOML + "[[prompt]]\nid = 'sort-words--tests'\ntext = 'z'\n", 7, 20),
    ],
)
def test_duplicates_are_refused_with_both_places(
    tmp_path: Path, name: str, content: str, first: int, second: int
) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(InputError) as caught:
        load_prompts(path)
    assert caught.value.line == second
    assert f"{path}:{first}" in str(caught.value)


def test_a_header_quoted_in_a_text_makes_no_wrong_line(tmp_path: Path) -> None:
    content = "format = 1\n[[prompt]]\nid = 'a'\ntext = '''\n[[prompt]]\n'''\n[[prompt]]\nid = 'a'\ntext = 'b'\n"
    with pytest.raises(InputError, match="the same id") as caught:
        load_prompts(write(tmp_path, "p.toml", content))
    assert caught.value.line is None


hostile_text = st.text(
    st.characters(exclude_categories=["Cs"]) | st.sampled_from("\x00\x1c\x85\u2028\u2029\ufeff\r\n\t\"\\'\u202e\u0301"),
    min_size=1,
).filter(lambda text: text.strip())


@settings(deadline=None, max_examples=100)
@given(st.lists(hostile_text, min_size=1, max_size=8, unique_by=fold))
def test_jsonl_brings_back_what_was_written(texts: list[str]) -> None:
    prompts = [
        Prompt(id=f"p-{n}", family="f", text=text.strip(), system=text, field=text) for n, text in enumerate(texts)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "p.jsonl"
        write_prompts(path, prompts)
        assert load_prompts(path) == prompts
