"""What two voices remember: each its own conversation, read once, in the memory of one model."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import RotatingKVCache
from mlx_lm.utils import load_model

from mlx_distill.backends.mlx.chatting import Voice, open_voices
from mlx_distill.backends.mlx.generation import ChatModel
from mlx_distill.layout import RunFolder
from tests.chat.talks import PROMPTS, alone, answers, said, talk
from tests.tiny import CHAT_TEMPLATE, make_tiny_model

#: Shows of earlier answers nothing, as templates do that leave out what a model thought.
FORGETFUL = CHAT_TEMPLATE.replace(
    "message['content']", "(message['content'] if message['role'] != 'assistant' else 'said')"
)


def test_what_is_remembered_changes_nothing(voices: tuple[Voice, Voice]) -> None:
    session = talk(voices)
    kept = [answers(session, prompt) for prompt in PROMPTS]
    session = talk(voices)
    fresh = []
    for prompt in PROMPTS:
        for voice in voices:
            voice.forget()
        fresh.append(answers(session, prompt))
    assert list(map(said, kept)) == list(map(said, fresh))
    for before, after, anew in zip(kept, kept[1:], fresh[1:], strict=False):
        for contender in after:
            assert after[contender].remembered_tokens >= before[contender].prompt_tokens
            assert after[contender].prompt_tokens == anew[contender].prompt_tokens
            assert anew[contender].remembered_tokens == 0


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of a model reads, from now on."""
    read = ChatModel.read
    counts: list[int] = []

    def counting(self: ChatModel, tokens: Any, cache: Any) -> Any:
        counts.append(len(tokens))
        return read(self, tokens, cache)

    monkeypatch.setattr(ChatModel, "read", counting)
    return counts


def test_only_what_is_new_is_read(voices: tuple[Voice, Voice], monkeypatch: pytest.MonkeyPatch) -> None:
    counts = counted(monkeypatch)
    session = talk(voices)
    for prompt in PROMPTS:
        counts.clear()
        found = answers(session, prompt)
        # Each answer is cut here: its last token is never read.
        assert {answer.stop for answer in found.values()} == {"length"}
        assert sum(counts) == sum(a.prompt_tokens - a.remembered_tokens + a.tokens - 1 for a in found.values())


def test_a_long_prompt_is_read_in_short_steps(voices: tuple[Voice, Voice], monkeypatch: pytest.MonkeyPatch) -> None:
    long = "for item in items " * 120
    whole = answers(talk(voices), long)
    assert whole["base"].prompt_tokens > 600
    monkeypatch.setattr("mlx_distill.backends.mlx.chatting._CHUNK", 64)
    counts = counted(monkeypatch)
    assert said(answers(talk(voices), long)) == said(whole)
    assert max(counts) == 64


def test_a_template_that_rewrites_what_was_said_is_read_again_from_there(tmp_path: Path) -> None:
    model = ChatModel(make_tiny_model(tmp_path / "m", chat_template=FORGETFUL))
    kept, fresh = alone(Voice(model)), alone(Voice(model))
    before = None
    for prompt in PROMPTS:
        fresh._voices["base"].forget()
        one, other = answers(kept, prompt)["base"], answers(fresh, prompt)["base"]
        assert one.text == other.text
        if before:
            assert before.prompt_tokens <= one.remembered_tokens < before.prompt_tokens + before.tokens - 1
        before = one


def test_a_cache_that_cannot_go_back_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a sliding window, which has dropped what it would have to go back to."""
    monkeypatch.setattr(ChatModel, "empty_cache", lambda _self: [RotatingKVCache(max_size=16) for _ in range(4)])
    model = ChatModel(make_tiny_model(tmp_path / "m", chat_template=FORGETFUL))
    kept, fresh = alone(Voice(model)), alone(Voice(model))
    for prompt in PROMPTS:
        fresh._voices["base"].forget()
        one, other = answers(kept, prompt)["base"], answers(fresh, prompt)["base"]
        assert (one.text, one.remembered_tokens) == (other.text, 0)


def test_the_two_take_the_memory_of_one(run: Path, tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "m")
    size = sum(value.nbytes for _, value in tree_flatten(load_model(folder)[0].parameters()))
    adapter = RunFolder(run).adapter.stat().st_size
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    pair = open_voices(folder, run)
    gc.collect()
    # Each array is rounded up to a page or so.
    assert mx.get_active_memory() - before < 1.1 * (size + adapter) < 1.5 * size
    assert answers(talk(pair), "add")["base"].tokens == 12
