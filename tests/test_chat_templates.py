"""Loss on every assistant turn as the templates of SmolLM2 and Qwen2.5 themselves render it, tools included.

The masks are held against transformers' own: a copy of each template marks what the assistant says with
`{% generation %}`, and renders the same text.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlx_distill.batches import TokenRow
from mlx_distill.dataset import tokenise_split
from mlx_distill.models.tokenizer import load_tokenizer

#: Renders what Qwen2.5's template renders: ChatML, a default system prompt, tools in the system's turn, calls as JSON
#: in the assistant's, and results, those in a row as one, in a user's. `BEGIN` and `END` enclose what is said.
QWEN = r"""
{%- set default = 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' %}
{%- set system = messages[0].content if messages[0].role == 'system' else default %}
{{- '<|im_start|>system\n' + system }}
{%- if tools %}
    {{- '\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' }}
    {{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' }}
    {%- for tool in tools %}{{- '\n' + tool | tojson }}{% endfor %}
    {{- '\n</tools>\n\nFor each function call, return a json object with function name and arguments within ' }}
    {{- '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": ' }}
    {{- '<args-json-object>}\n</tool_call>' }}
{%- endif %}
{{- '<|im_end|>\n' }}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- elif message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}{BEGIN}{{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {%- if message.content or not loop.first %}{{- '\n' }}{% endif %}
            {{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}{END}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\n' }}{% endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""

#: SmolLM2's template, which is at hand, once more, to be marked.
SMOLLM2 = r"""
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}{BEGIN}{{- message.content + '<|im_end|>\n' }}{END}
    {%- else %}{{- message.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
"""

TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]


def marked(template: str, *, marks: bool) -> str:
    begin, end = ("{%- generation %}", "{%- endgeneration %}") if marks else ("", "")
    return template.strip("\n").replace("{BEGIN}", begin).replace("{END}", end)


class Model:
    """A tokenizer with a template, and one whose template marks what the assistant says."""

    def __init__(self, folder: Path, template: str, *, own: bool) -> None:
        self.tokenizer = load_tokenizer(folder)
        if not own:
            self.tokenizer.chat_template = marked(template, marks=False)
        self.marking = copy.deepcopy(self.tokenizer)
        self.marking.chat_template = marked(template, marks=True)


@pytest.fixture(scope="module")
def models(tiny_model: Path, smollm2: Path) -> dict[str, Model]:
    """SmolLM2 as it is; Qwen2.5's template over a small tokenizer of its kind."""
    return {"smollm2": Model(smollm2, SMOLLM2, own=True), "qwen2.5": Model(tiny_model, QWEN, own=False)}


def tokenise(folder: Path, row: dict[str, Any], model: Model) -> TokenRow:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    split = tokenise_split(path, model.tokenizer, max_length=4096)
    assert not split.skipped
    (found,) = split.rows
    return found


def as_templates_take_it(row: dict[str, Any]) -> list[dict[str, Any]]:
    """With content always there, and a call's arguments as an object."""
    messages = copy.deepcopy(row["messages"])
    for message in messages:
        message["content"] = message.get("content") or ""
        for call in message.get("tool_calls", []):
            if isinstance(call["function"]["arguments"], str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return list(messages)


def spoken(row: TokenRow, model: Model) -> list[str]:
    """The texts of the runs of tokens that carry loss."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], row.loss_mask, [False]]).astype(int)))
    ends = zip(edges[::2], edges[1::2], strict=True)
    return [str(model.tokenizer.decode(row.tokens[a:b].tolist())) for a, b in ends]


# Conversations of any length and any order that a template allows

WORDS = st.sampled_from(
    ["Add 1 and 2.", "def f(x):\n    return x\n", "été 漢字 \U0001f40d", "{}", '"quoted" \\n', "ok", "a  b\n\n\nc", "7"]
)
CALL = st.builds(
    lambda name, value, as_text: {
        "type": "function",
        "function": {"name": name, "arguments": json.dumps({"x": value}) if as_text else {"x": value}},
    },
    st.sampled_from(["add", "now"]),
    WORDS,
    st.booleans(),
)


def says(role: str) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda text: {"role": role, "content": text}, WORDS)


ASKS = st.tuples(
    st.builds(
        lambda text, calls: {"role": "assistant", "content": text, "tool_calls": calls},
        st.none() | WORDS,
        st.lists(CALL, min_size=1, max_size=2),
    ),
    st.lists(says("tool"), max_size=3),
).map(lambda pair: [pair[0], *pair[1]])
PART = st.one_of(
    says("user").map(lambda m: [m]), says("assistant").map(lambda m: [m]), says("system").map(lambda m: [m])
)


def conversations(*, calls: bool) -> st.SearchStrategy[dict[str, Any]]:
    parts = st.lists(PART | ASKS if calls else PART | says("tool").map(lambda m: [m]), max_size=6)
    return st.builds(
        lambda system, first, rest, last, tools: {
            "messages": [*system, first, *(m for part in rest for m in part), last],
            **({"tools": TOOLS} if tools else {}),
        },
        st.lists(says("system"), max_size=1),
        says("user"),
        parts,
        says("assistant"),
        st.booleans() if calls else st.just(False),
    )


def check(row: dict[str, Any], model: Model, folder: Path) -> None:
    messages, tools = as_templates_take_it(row), row.get("tools")
    whole = model.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    assert model.marking.apply_chat_template(messages, tools=tools, tokenize=False) == whole
    expected = model.marking.apply_chat_template(
        messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    found = tokenise(folder, row, model)
    assert found.tokens.tolist() == expected["input_ids"]
    assert found.loss_mask.astype(int).tolist() == expected["assistant_masks"]
    turns = [message for message in messages if message["role"] == "assistant"]
    parts = "".join(spoken(found, model))
    assert parts.count("<|im_end|>\n") == len(turns)
    for turn in turns:
        assert turn["content"] in parts


EXAMPLES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@EXAMPLES
@example({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]})
@given(conversations(calls=True))
def test_qwens_turns_carry_loss_and_nothing_else(models: dict[str, Model], tmp_path: Path, row: dict[str, Any]) -> None:
    check(row, models["qwen2.5"], tmp_path)


@EXAMPLES
@given(conversations(calls=False))
def test_smollm2s_turns_carry_loss_and_nothing_else(
    models: dict[str, Model], tmp_path: Path, row: dict[str, Any]
) -> None:
    check(row, models["smollm2"], tmp_path)


# By hand

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "What is 1 + 2?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": '{"x": 1, "y": 2}'}}],
    },
    {"role": "tool", "content": "3", "name": "add", "tool_call_id": "c1"},
    {"role": "tool", "content": "done", "name": "add", "tool_call_id": "c2"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "And 2 + 2?"},
    {"role": "assistant", "content": "4."},
]


def test_a_conversation_with_tools_reads_as_qwen_writes_it(models: dict[str, Model], tmp_path: Path) -> None:
    model = models["qwen2.5"]
    row = tokenise(tmp_path, {"messages": TALK, "tools": TOOLS[1:]}, model)
    assert model.tokenizer.decode(row.tokens.tolist()) == (
        "<|im_start|>system\nBe short.\n\n# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        '{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}\n'
        "</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call><|im_end|>\n"
        "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n"
        '<|im_start|>assistant\n<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": 2}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\n3\n</tool_response>\n<tool_response>\ndone\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\nIt is 3.<|im_end|>\n"
        "<|im_start|>user\nAnd 2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n4.<|im_end|>\n"
    )
    assert spoken(row, model) == [
        '<tool_call>\n{"name": "add", "arguments": {"x": 1, "y": 2}}\n</tool_call><|im_end|>\n',
        "It is 3.<|im_end|>\n",
        "4.<|im_end|>\n",
    ]


def test_the_same_without_tools_reads_as_smollm2_writes_it(models: dict[str, Model], tmp_path: Path) -> None:
    model = models["smollm2"]
    row = tokenise(tmp_path, {"messages": [TALK[0], TALK[1], *TALK[3:4], *TALK[5:]]}, model)
    assert model.tokenizer.decode(row.tokens.tolist()) == (
        "<|im_start|>system\nBe short.<|im_end|>\n"
        "<|im_start|>user\nWhat is 1 + 2?<|im_end|>\n"
        "<|im_start|>tool\n3<|im_end|>\n"
        "<|im_start|>assistant\nIt is 3.<|im_end|>\n"
        "<|im_start|>user\nAnd 2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n4.<|im_end|>\n"
    )
    assert spoken(row, model) == ["It is 3.<|im_end|>\n", "4.<|im_end|>\n"]


@pytest.mark.parametrize(
    ("name", "system"),
    [
        ("qwen2.5", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        ("smollm2", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    ],
)
def test_the_default_system_prompt_is_read_and_not_learned(
    models: dict[str, Model], tmp_path: Path, name: str, system: str
) -> None:
    model = models[name]
    row = tokenise(tmp_path, {"messages": TALK[6:]}, model)
    text = model.tokenizer.decode(row.tokens.tolist())
    assert text.startswith(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n")
    assert spoken(row, model) == ["4.<|im_end|>\n"]
