"""A chat template that writes the date writes the same one into training rows on every day."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from mlx_distill import rows, tokenising
from mlx_distill.dataset import tokenise_split
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.rows import TODAY, Row, read_rows, render_row
from mlx_distill.tokenising import tokenizer_identity
from tests.tiny import CHAT_TEMPLATE

#: As of Llama 3.2, which takes a day of its own where it is told none.
FALLING_BACK = (
    "{%- if strftime_now is defined %}\n    {%- set date_string = strftime_now('%d %b %Y') %}\n"
    "{%- else %}\n    {%- set date_string = '26 Jul 2024' %}\n{%- endif %}\n"
    "{{- '<|im_start|>system\\nToday Date: ' + date_string + '<|im_end|>\\n' }}\n"
)

#: As of SmolLM3 and others, which rely on it.
RELYING = "{{- '<|im_start|>system\\nToday: ' ~ strftime_now('%-d %B %Y') ~ '<|im_end|>\\n' }}\n"

PREFACES = {"falling back": FALLING_BACK, "relying": RELYING}

TALK = [
    {"role": "user", "content": "What day is it?"},
    {"role": "assistant", "content": "I do not know."},
    {"role": "user", "content": "strftime_now('%d')"},
    {"role": "assistant", "content": "%d"},
]

FORMATS = [
    "%d %b %Y",
    "%Y-%m-%d",
    "%A, %d %B %Y, %H:%M:%S %p",
    "100%% %%d %%%d",
    "%-d/%-m/%y",
    "%j %U %W %u %w %e|%F|%T|%D|%R|%c|%x|%X|%I|%f|%Z|%z|%G-%V|%h|%C%n%t",
    "no day",
    "",
]


def let_it_be(monkeypatch: pytest.MonkeyPatch, day: datetime) -> None:
    """Set the clock that transformers gives to templates."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls(*day.timetuple()[:6])

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"messages": TALK}) + "\n", encoding="utf-8")
    return path


def dated(model: Path, preface: str) -> Any:
    tokenizer = load_tokenizer(model)
    tokenizer.chat_template = preface + CHAT_TEMPLATE
    return tokenizer


@pytest.mark.parametrize("kind", PREFACES)
def test_a_row_has_the_same_tokens_on_every_day(
    tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    tokenizer = dated(tiny_model, PREFACES[kind])
    found, prompts = [], []
    for day in (datetime(2026, 11, 30), datetime(2026, 12, 1, 23, 59)):
        let_it_be(monkeypatch, day)
        (row,) = tokenise_split(data, tokenizer, max_length=512).rows
        found.append((row.tokens.tolist(), row.loss_mask.tolist()))
        prompts.append(tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True))
    assert found[0] == found[1]
    assert "26 Jul" in tokenizer.decode(found[0][0])
    assert prompts[0] != prompts[1], "a question is asked on the day that it is"


@pytest.mark.parametrize("kind", PREFACES)
def test_it_is_what_the_template_itself_writes_on_that_day(
    tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    tokenizer = dated(tiny_model, PREFACES[kind])
    (row,) = read_rows(data)
    rendered = render_row(row, tokenizer, data)
    let_it_be(monkeypatch, TODAY)
    assert rendered.text == tokenizer.apply_chat_template(TALK, tokenize=False)
    assert [rendered.text[a:b] for a, b in rendered.spans or ()] == [
        "I do not know.<|im_end|>\n",
        "%d<|im_end|>\n",
    ]


def test_it_is_the_day_that_a_template_falls_back_to(tiny_model: Path, data: Path) -> None:
    (row,) = read_rows(data)
    without = FALLING_BACK.replace("strftime_now", "no_clock")
    assert render_row(row, dated(tiny_model, FALLING_BACK), data) == render_row(row, dated(tiny_model, without), data)


@pytest.mark.parametrize("lead", ["", "\n", "  {% if true %}\n  a{% endif %}", "\n\n  {%- if true %}b{% endif %}"])
@pytest.mark.parametrize("form", FORMATS)
def test_any_form_of_a_date_and_any_beginning_of_a_template(
    tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch, form: str, lead: str
) -> None:
    tokenizer = dated(
        tiny_model, lead + f"{{%- set now = strftime_now({form!r}) %}}[{{{{ now + '|' + now | upper }}}}]\n"
    )
    (row,) = read_rows(data)
    text = render_row(row, tokenizer, data).text
    let_it_be(monkeypatch, TODAY)
    assert text == tokenizer.apply_chat_template(TALK, tokenize=False)


def test_tools_choose_the_template_as_ever(tiny_model: Path, data: Path) -> None:
    tokenizer = load_tokenizer(tiny_model)
    tokenizer.chat_template = {"default": FALLING_BACK + CHAT_TEMPLATE, "tool_use": RELYING + CHAT_TEMPLATE}
    (row,) = read_rows(data)
    assert row.chat is not None
    asked = Row(row.line, chat=row.chat.model_copy(update={"tools": [{"type": "function", "function": {"name": "f"}}]}))
    assert "Today Date: 26 Jul 2024" in render_row(row, tokenizer, data).text
    assert "Today: 26 July 2024" in render_row(asked, tokenizer, data).text


def test_another_day_would_be_another_key_of_the_token_cache(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(tiny_model)
    before = tokenizer_identity(tokenizer)
    assert rows.TODAY == tokenising.TODAY
    monkeypatch.setattr(tokenising, "TODAY", datetime(2025, 1, 1))
    assert tokenizer_identity(tokenizer) != before
