"""What is typed into a conversation beside prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_distill.backends.mlx.chatting import Voice
from mlx_distill.chat.commands import COMMANDS, as_prompt, is_command, obey
from mlx_distill.chat.session import Session
from mlx_distill.errors import FolderError, InputError, ResourceError
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.records import ChatRow
from mlx_distill.rows import assistant_spans, read_rows
from tests.chat.talks import PROMPTS, answers, said, talk


def test_what_is_a_prompt_and_what_is_not() -> None:
    assert [is_command(line) for line in ("/help", "//help", "help", " /help", "")] == [
        True,
        False,
        False,
        False,
        False,
    ]
    assert [as_prompt(line) for line in ("//etc/passwd", "a // b")] == ["/etc/passwd", "a // b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/hlep", "There is no /hlep; did you mean /help?"),
        ("/rest", "There is no /rest; did you mean /reset?"),
        ("/sytem Be short.", "There is no /sytem; did you mean /system?"),
        ("/zzz", "There is no /zzz.\n"),
        ("/", "There is no /.\n"),
        ("/only teacher", "/only needs base, distilled or both."),
        ("/only", "/only needs base, distilled or both."),
        ("/reset now", "/reset takes nothing after it."),
        ("/save", "/save needs the name of a file."),
        ("/save x.jsonl", "Nothing was said yet."),
    ],
)
def test_a_mistake_is_told(voices: tuple[Voice, Voice], line: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        obey(talk(voices), line)
    assert str(caught.value).startswith(message)


def test_help_names_every_command(voices: tuple[Voice, Voice]) -> None:
    told = obey(talk(voices), "/help").lines
    assert [line.split()[0] for line in told[: len(COMMANDS)]] == list(COMMANDS)
    assert [name for name in COMMANDS if obey_quits(talk(voices), name)] == ["/quit"]


def obey_quits(session: Session, name: str) -> bool:
    try:
        return obey(session, name).quits
    except InputError:
        return False


def test_who_answers_can_be_chosen(voices: tuple[Voice, Voice]) -> None:
    session = talk(voices)
    for line, asked in (("/only base", ["base"]), ("/only both", ["base", "distilled"])):
        obey(session, line)
        assert list(answers(session, PROMPTS[0])) == asked
    assert [len(session.history(contender)) for contender in session.contenders] == [4, 2]
    obey(session, "/only distilled")
    assert list(answers(session, PROMPTS[1])) == ["distilled"]


def test_a_system_prompt_holds_for_all_that_was_said(voices: tuple[Voice, Voice]) -> None:
    session = talk(voices)
    first = answers(session, PROMPTS[0])
    obey(session, "/system  Be short. ")
    assert [message.role for message in session.history("base")] == ["system", "user", "assistant"]
    assert session.history("base")[0].content == "Be short."
    obey(session, "/reset")
    assert session.history("base") == []
    assert answers(session, PROMPTS[0])["base"].text != first["base"].text
    obey(session, "/system")
    obey(session, "/reset")
    assert said(answers(session, PROMPTS[0])) == said(first)
    assert [turn.system for turn in session.turns] == [None, "Be short.", None]


def test_what_is_saved_is_a_data_set(voices: tuple[Voice, Voice], tiny_model: Path, tmp_path: Path) -> None:
    session = talk(voices, system='Write "é" and \u2028.')
    for prompt in PROMPTS[:2]:
        answers(session, prompt)
    path = tmp_path / "new" / "talk.jsonl"
    assert obey(session, f"/save {path}").lines == (f"Saved 2 conversations to {path}.",)
    tokenizer = load_tokenizer(tiny_model)
    for row, contender in zip(read_rows(path), session.contenders, strict=True):
        assert row.chat == ChatRow(messages=tuple(session.history(contender)))
        _, spans = assistant_spans(row.chat, tokenizer)
        assert len(spans) == 2
    before = path.read_bytes()
    with pytest.raises(FolderError, match="exists"):
        obey(session, f"/save {path}")
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["talk.jsonl"]


def test_only_who_spoke_is_saved(voices: tuple[Voice, Voice], tmp_path: Path) -> None:
    session = talk(voices, asked=("distilled",))
    answers(session, PROMPTS[0])
    obey(session, f"/save {tmp_path}/talk.jsonl")
    (line,) = (tmp_path / "talk.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["contender"] == "distilled"


@pytest.mark.parametrize("name", ["", "taken", "link", "file/below", "a\0b", "x" * 300])
def test_nothing_is_replaced_by_saving(voices: tuple[Voice, Voice], tmp_path: Path, name: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x", encoding="utf-8")
    session = talk(voices)
    answers(session, PROMPTS[0])
    with pytest.raises((FolderError, InputError, ResourceError)):
        obey(session, f"/save {tmp_path}/{name}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "taken"]
    assert (tmp_path / "file").read_text(encoding="utf-8") == "x"
    assert not (tmp_path / "nowhere").exists()
