"""Tokenising by the batch and on all cores: the same as one row at a time, errors in the order of the file."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_distill.errors import InputError, ModelError
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.rows import Row, read_rows, render_row
from mlx_distill.tokenising import token_count, tokenise_rows, tokenizer_identity
from tests.tiny import CHAT_TEMPLATE, make_tiny_model


def chat(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def reference(path: Path, tokenizer: Any) -> list[tuple[int, list[int], list[bool]]]:
    """Row by row, and the mask by the list of all offsets."""
    made = []
    for row in read_rows(path):
        rendered = render_row(row, tokenizer, path)
        if rendered.spans is None:
            tokens = list(tokenizer(rendered.text)["input_ids"])
            if tokens[-1:] != [tokenizer.eos_token_id]:
                tokens.append(tokenizer.eos_token_id)
            mask = [True] * len(tokens)
        else:
            encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
            tokens = list(encoded["input_ids"])
            mask = [any(a <= start < b for a, b in rendered.spans) for start, _ in encoded["offset_mapping"]]
        made.append((row.line, tokens, [False, *mask[1:]] if mask else []))
    return made


def batched(path: Path, tokenizer: Any, batch_characters: int) -> list[tuple[int, list[int], list[bool]]]:
    rows = tokenise_rows(read_rows(path), tokenizer, path, batch_characters=batch_characters)
    return [(line, row.tokens.tolist(), row.loss_mask.tolist()) for line, row in rows]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["def f():\n    return 1\n", " two  words ", "e\u0301\u0323", "\U0001f40d\U0001f40d", "a<|im_end|>b", "½ ﬁ", "漢字"]
)
TALK = st.lists(st.tuples(st.sampled_from(["user", "assistant"]), TEXT), max_size=5).map(
    lambda turns: chat(("user", "x"), *turns, ("assistant", "y"))
)
ROWS = st.lists(TALK | TEXT.map(lambda text: {"text": text}), min_size=1, max_size=12)


def spaces_dropped() -> Tokenizer:
    """Words alone: what lies between them is in no token."""
    words = {"[UNK]": 0, "user": 1, "assistant": 2, "x": 3, "y": 4, "def": 5, "return": 6, "two": 7, "words": 8}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def spaces_prepended() -> Tokenizer:
    """As of Llama 2 and Mistral: a mark for each space and one before the text, and characters taken apart."""
    words = {"[UNK]": 0, "▁": 1, **{letter: at + 2 for at, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


def wrapped(tokenizer: Tokenizer) -> Any:
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in ("<|im_start|>", "<|im_end|>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", chat_template=CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def tokenizers(tiny_model: Path, smollm2: Path) -> dict[str, Any]:
    return {
        "tiny": load_tokenizer(tiny_model),
        "smollm2": load_tokenizer(smollm2),
        "spaces_dropped": wrapped(spaces_dropped()),
        "spaces_prepended": wrapped(spaces_prepended()),
    }


@pytest.mark.parametrize("name", ["tiny", "smollm2", "spaces_dropped", "spaces_prepended"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, size=st.sampled_from([1, 60, 1 << 18]))
def test_a_batch_gives_what_each_row_gives(
    name: str, tokenizers: dict[str, Any], tmp_path: Path, rows: list[dict[str, Any]], size: int
) -> None:
    path = write(tmp_path / "rows.jsonl", rows)
    assert batched(path, tokenizers[name], size) == reference(path, tokenizers[name])


@pytest.mark.parametrize("size", [500, 20_000, 1 << 18])
def test_all_cores_give_what_one_gives(
    tokenizers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    rows = [chat(("user", f"add {at}"), ("assistant", f"return {at * 7} " * (1 + at % 40))) for at in range(300)]
    path = write(tmp_path / "rows.jsonl", rows)
    alone = batched(path, tokenizers["smollm2"], size)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert batched(path, tokenizers["smollm2"], size) == alone == reference(path, tokenizers["smollm2"])


def test_no_more_is_read_than_two_batches_ahead(tokenizers: dict[str, Any]) -> None:
    """Memory does not grow with the file."""
    read = 0

    def endless() -> Iterator[Row]:
        nonlocal read
        while True:
            read += 1
            yield Row(read, text="x" * 100)

    rows = tokenise_rows(endless(), tokenizers["tiny"], Path("rows.jsonl"), batch_characters=1000)
    for got, (line, _) in enumerate(rows, start=1):
        assert line == got
        assert read <= got + 20
        if got == 200:
            break
    rows.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tokenise")]


# What is refused

#: JSON can write half a character into a tool's arguments, which are JSON themselves: it is found only in the end.
HALF = {
    "messages": [
        {"role": "user", "content": "x"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": "\\ud800"}'}}]},
    ]
}
REFUSED = chat(("user", "refuse this"), ("assistant", "y"))
TEMPLATE = (
    "{% for message in messages %}{% if 'refuse' in message['content'] %}{{ raise_exception('no') }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.arguments.a }}{% endfor %}{{ '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
GOOD = chat(("user", "add"), ("assistant", "return first + second"))


@pytest.mark.parametrize("size", [1, 150, 1 << 18])
@pytest.mark.parametrize("at", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1)])
def test_the_first_bad_line_is_the_one_named(tiny_model: Path, tmp_path: Path, at: tuple[int, ...], size: int) -> None:
    """Whether it is bad JSON, refused by the template or by the tokenizer, which come at different times."""
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = TEMPLATE
    lines = [json.dumps(GOOD)] * 40
    says = ["not valid JSON", "template refuses this chat: no", "cannot be tokenised"]
    for bad, place in zip(("{", json.dumps(REFUSED), json.dumps(HALF)), at, strict=True):
        lines[20 + place] = bad
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        batched(path, tokenizer, size)
    assert (caught.value.path, caught.value.line) == (path, 21)
    assert says[at.index(0)] in str(caught.value)


def test_a_text_without_an_end_to_learn_is_refused_by_line(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.eos_token = None
    path = write(tmp_path / "rows.jsonl", [GOOD, {"text": "x"}])
    with pytest.raises(InputError, match=r"rows\.jsonl:2: .*no token that ends a text"):
        batched(path, tokenizer, 1000)
    assert len(batched(write(path, [GOOD]), tokenizer, 1000)) == 1


# Which tokenizer it was


def test_a_tokenizer_keeps_its_identity(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    before = tokenizer_identity(tokenizer)
    tokenizer(["x", "a longer text"], padding=True, truncation=True, max_length=3)
    assert tokenizer_identity(tokenizer) == before == tokenizer_identity(load_tokenizer(tiny_model))


def test_whatever_decides_the_tokens_makes_another_identity(tiny_model: Path, tmp_path: Path) -> None:
    tokenizers = [load_tokenizer(tiny_model) for _ in range(4)]
    tokenizers[0].chat_template = CHAT_TEMPLATE + " "
    tokenizers[1].add_tokens(["return"])
    tokenizers[2].eos_token = "<|endoftext|>"
    tokenizers[3].backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizers.append(load_tokenizer(make_tiny_model(tmp_path / "model", vocabulary=380)))
    assert len({tokenizer_identity(found) for found in [load_tokenizer(tiny_model), *tokenizers]}) == 6


def test_a_tokenizer_that_cannot_tell_where_its_tokens_stand_is_refused() -> None:
    class Slow:
        is_fast = False
        name_or_path = "some/model"

    with pytest.raises(ModelError, match=r"some/model has no tokenizer\.json"):
        tokenizer_identity(Slow())


def test_the_highest_token_is_counted_with_those_that_were_added(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    assert token_count(tokenizer) == 384
    tokenizer.add_tokens(["quite new"])
    assert token_count(tokenizer) == 385
    assert np.max(tokenizer("quite new")["input_ids"]) == 384
