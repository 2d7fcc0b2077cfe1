"""A conversation: each says what its own model says, at once or one after the other, and can be stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.backends.mlx.chatting import Voice, open_voices
from mlx_distill.backends.mlx.generation import ChatModel, Generator
from mlx_distill.chat.commands import obey
from mlx_distill.chat.opening import open_chat
from mlx_distill.chat.session import Answer, Event, Piece, Session
from mlx_distill.config import ChatConfig
from mlx_distill.errors import InputError, ModelError, ResourceError
from mlx_distill.layout import RunFolder
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.records import Contender, Message
from mlx_distill.training.run import train
from tests.chat.talks import PROMPTS, alone, answers, said, talk, texts
from tests.tiny import make_tiny_model
from tests.training.runs import make_data, settings

# What is said.


@pytest.mark.parametrize("system", [None, "Be short."])
@pytest.mark.parametrize("together", [True, False])
def test_each_says_what_its_own_folder_says_greedily(
    voices: tuple[Voice, Voice], run: Path, tiny_model: Path, system: str | None, together: bool
) -> None:
    generators = {"base": Generator(tiny_model), "distilled": Generator(RunFolder(run).fused)}
    session = talk(voices, system=system)
    for prompt in PROMPTS:
        found = answers(session, prompt, together=together)
        assert found["base"].text != found["distilled"].text
        for contender, answer in found.items():
            *conversation, last = session.history(contender)
            assert last == Message(role="assistant", content=answer.text)
            assert conversation[-1] == Message(role="user", content=prompt)
            (expected,) = generators[contender].answer([conversation], max_tokens=12, batch_size=1)
            assert (answer.text, answer.stop, answer.tokens) == (expected.text, expected.stop, expected.tokens)
    assert [len(session.history(who)) for who in session.contenders] == [6 + bool(system)] * 2


def test_the_two_take_turns(voices: tuple[Voice, Voice]) -> None:
    events = list(talk(voices).ask(PROMPTS[0]))
    ends = [at for at, event in enumerate(events) if isinstance(event, Answer)]
    first = [event.contender for event in events[: ends[0]]]
    assert {*first} == {"base", "distilled"}
    # A character of several tokens comes with its last: one may be some tokens ahead in pieces, not more.
    lead = [first[:at].count("base") - first[:at].count("distilled") for at in range(len(first))]
    assert max(map(abs, lead)) <= 4


def test_or_one_waits_for_the_other(voices: tuple[Voice, Voice]) -> None:
    contenders = [event.contender for event in talk(voices).ask(PROMPTS[0], together=False)]
    assert contenders == sorted(contenders)
    assert {*contenders} == {"base", "distilled"}


def test_the_pieces_are_the_text(voices: tuple[Voice, Voice]) -> None:
    session = talk(voices, max_tokens=200)
    events = list(session.ask(PROMPTS[0]))
    for event in events:
        if isinstance(event, Answer):
            pieces = [e.text for e in events if isinstance(e, Piece) and e.contender == event.contender]
            assert "".join(pieces) == event.text
            assert len(pieces) > 50
            assert all(pieces)


def test_half_a_character_is_not_shown(tmp_path: Path) -> None:
    """Random bytes are mostly no text, and what is no text yet may become some."""
    session = alone(Voice(ChatModel(make_tiny_model(tmp_path / "m", vocabulary=259))), max_tokens=300, temperature=2.0)
    events = list(session.ask("x"))
    (answer,) = (event for event in events if isinstance(event, Answer))
    pieces = [event.text for event in events if isinstance(event, Piece)]
    assert "\ufffd" in answer.text
    assert "".join(pieces) == answer.text[: len("".join(pieces))]
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


# Chance.


def test_what_is_drawn_follows_from_the_seed(voices: tuple[Voice, Voice]) -> None:
    def drawn(seed: int, **options: Any) -> list[dict[Contender, str]]:
        session = talk(voices, temperature=1.0, seed=seed, **options)
        for prompt in PROMPTS:
            answers(session, prompt)
        return texts(session)

    both = drawn(7)
    assert drawn(7) == both
    assert drawn(8) != both
    assert drawn(7, asked=("distilled",)) == [{"distilled": turn["distilled"]} for turn in both]
    greedy = talk(voices)
    assert texts(greedy) == []
    answers(greedy, PROMPTS[0])
    assert texts(greedy)[0] != both[0]


def test_no_two_turns_draw_alike(voices: tuple[Voice, Voice]) -> None:
    session = talk(voices, temperature=1.0)
    for _ in range(3):
        answers(session, PROMPTS[0])
        session.reset()
    assert len({turn["base"] for turn in texts(session)}) == 3


def test_what_differs_between_the_two_is_not_chance(tiny_model: Path, tmp_path: Path) -> None:
    """A student that learned nothing says what the base says, at any temperature."""
    run = tmp_path / "idle"
    train(settings(make_data(tmp_path / "data"), tiny_model, run, epochs=1, learning_rate=1e-12))
    found = answers(talk(open_voices(tiny_model, run), temperature=1.0, max_tokens=40), PROMPTS[0])
    assert found["base"].text == found["distilled"].text


# Ends.


@pytest.fixture
def short(tmp_path: Path) -> Voice:
    """A model that sees 96 tokens at once."""
    folder = make_tiny_model(tmp_path / "short")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 96}), encoding="utf-8")
    return Voice(ChatModel(folder))


def test_a_full_context_is_told_and_a_reset_goes_on(short: Voice) -> None:
    session = alone(short, max_tokens=80)
    first = answers(session, "add")["base"]
    assert (first.stop, first.tokens) == ("context", 96 - first.prompt_tokens)
    with pytest.raises(InputError, match=r"conversation with base is \d+ tokens long .* context of 96 .*\n.*/reset"):
        list(session.ask("more"))
    assert len(session.history("base")) == 2
    assert session.turns[-1].problem is not None
    session.reset()
    assert answers(session, "add")["base"].text == first.text
    assert [turn.conversation for turn in session.turns] == [0, 0, 1]
    assert answers(alone(short, max_tokens=5), "add")["base"].stop == "length"


def test_an_answer_may_end_by_itself(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m")
    voice = Voice(ChatModel(folder))
    whole = answers(alone(voice), "add")["base"]
    tokens = load_tokenizer(folder).encode(whole.text, add_special_tokens=False)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": tokens[4]}), encoding="utf-8")
    ended = answers(alone(Voice(ChatModel(folder))), "add")["base"]
    assert (ended.stop, ended.tokens) == ("end", tokens.index(tokens[4]))
    assert whole.text.startswith(ended.text)


def until(session: Session, prompt: str, pieces: int) -> list[Event]:
    """The events of a turn that is stopped after some pieces."""
    events: list[Event] = []
    for event in session.ask(prompt):
        events.append(event)
        if len(events) == pieces:
            session.stop()
    return events


def test_what_was_stopped_is_part_of_the_conversation(voices: tuple[Voice, Voice]) -> None:
    session = talk(voices, max_tokens=200)
    whole = answers(session, PROMPTS[0])
    session = talk(voices, max_tokens=200)
    stopped = {event.contender: event for event in until(session, PROMPTS[0], 9) if isinstance(event, Answer)}
    for contender, answer in stopped.items():
        assert answer.stop == "stopped"
        assert 3 < answer.tokens < 20
        assert answer.text
        assert whole[contender].text.startswith(answer.text)
        assert session.history(contender)[-1].content == answer.text
    after = answers(session, PROMPTS[1])
    histories = {contender: session.history(contender) for contender in session.contenders}
    assert all(len(history) == 4 for history in histories.values())
    for voice in voices:
        voice.forget()
    for voice, (contender, history) in zip(voices, histories.items(), strict=True):
        *_, last = voice.answer(voice.encode(history[:3]), max_tokens=200, temperature=0, key=0)
        assert (last.text, last.stop, last.tokens) == said(after)[contender]


def test_what_was_stopped_before_its_first_word_leaves_no_trace(
    voices: tuple[Voice, Voice], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = talk(voices)
    read = ChatModel.read

    def stopping(self: ChatModel, tokens: Any, cache: Any) -> Any:
        session.stop()
        return read(self, tokens, cache)

    with monkeypatch.context() as patch:
        patch.setattr(ChatModel, "read", stopping)
        found = answers(session, PROMPTS[0])
    assert said(found) == {"base": ("", "stopped", 0), "distilled": ("", "stopped", 0)}
    assert [session.history(contender) for contender in session.contenders] == [[], []]
    expected = answers(talk(voices), PROMPTS[0])
    assert said(answers(session, PROMPTS[0])) == said(expected)


def test_a_turn_that_is_left_does_no_harm(voices: tuple[Voice, Voice]) -> None:
    expected = answers(talk(voices), PROMPTS[1])
    session = talk(voices)
    for _ in session.ask(PROMPTS[0]):
        break
    assert said(answers(session, PROMPTS[1])) == said(expected)


def test_a_machine_out_of_memory_keeps_the_conversation(
    voices: tuple[Voice, Voice], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = talk(voices)
    before = answers(session, PROMPTS[0])
    calls: Iterator[int] = iter(range(100))
    read = ChatModel.read

    def failing(self: ChatModel, tokens: Any, cache: Any) -> Any:
        if next(calls) == 9:
            raise RuntimeError("[metal::malloc] Attempting to allocate 99 bytes")
        return read(self, tokens, cache)

    with monkeypatch.context() as patch:
        patch.setattr(ChatModel, "read", failing)
        with pytest.raises(ResourceError, match="out of memory"):
            list(session.ask(PROMPTS[1]))
    assert session.turns[-1].problem is not None
    after = answers(session, PROMPTS[2])
    expected = talk(voices)
    assert said(answers(expected, PROMPTS[0])) == said(before)
    assert said(answers(expected, PROMPTS[2])) == said(after)


# Refusals.


@pytest.mark.parametrize("system", [None, "bad \udcff"])
def test_what_is_no_text_is_refused(voices: tuple[Voice, Voice], system: str | None) -> None:
    session = talk(voices, system=system)
    with pytest.raises(InputError, match="no text"):
        list(session.ask("add" if system else "\udcff"))
    session.system = None
    assert answers(session, "add")["base"].tokens == 12


def test_what_the_template_refuses_is_told_and_can_be_undone(tmp_path: Path) -> None:
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    session = alone(Voice(ChatModel(make_tiny_model(tmp_path / "model", chat_template=refuses))), system="Be short.")
    with pytest.raises(InputError, match=r"base cannot be asked: .*no system role[^/]*/system without"):
        list(session.ask("add"))
    obey(session, "/system")
    assert answers(session, "add")["base"].tokens == 12


def test_a_run_is_opened_as_it_is_configured(run: Path) -> None:
    opened = open_chat(ChatConfig(run=run, only="distilled", system="Be short.", max_tokens=3))
    assert opened.names == {"base": "model", "distilled": "tuned"}
    assert said(answers(opened.session, "add")).keys() == {"distilled"}
    assert opened.session.history("distilled")[0] == Message(role="system", content="Be short.")
    assert opened.session.turns[0].answers[0].tokens == 3


def test_a_run_that_cannot_be_opened_says_why(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mlx-distill train"):
        open_chat(ChatConfig(run=tmp_path / "none"))
    other = tmp_path / "other"
    other.mkdir()
    for file in ("run.json", "adapter_config.json"):
        (other / file).write_bytes((run / file).read_bytes())
    (other / "adapters.safetensors").write_bytes(RunFolder(run).adapter.read_bytes()[:-7])
    with pytest.raises(ModelError, match="does not load"):
        open_chat(ChatConfig(run=other))
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    record["model"]["revision"] = "0" * 40
    (other / "run.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(ModelError, match="is not what it was"):
        open_chat(ChatConfig(run=other))
