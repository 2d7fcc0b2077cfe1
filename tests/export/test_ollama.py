"""A Modelfile says to Ollama what the student's own template says, and nothing that stands in a text is a command."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.export.gguf import write_gguf
from mlx_distill.export.ollama import write_modelfile
from mlx_distill.export.ollama_template import as_ollama_writes
from mlx_distill.models.tokenizer import load_tokenizer
from tests.test_chat_templates import QWEN, SMOLLM2, marked
from tests.tiny import CHAT_TEMPLATE, make_tiny_model

LLAMA3 = (
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<start>' + ('model' if message.role == 'assistant' else message.role) + '\n' + message.content + '<end>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)
HEADED = "{{ '[head]' }}" + CHAT_TEMPLATE.replace("You are a helpful assistant.", "x").replace(
    "{% if loop.first and message['role'] != 'system' %}", "{% if false %}"
)
#: Llama 3.1's and 3.2's without its tools: the system has a turn even where it says nothing.
LLAMA31 = (
    "{{ bos_token }}{% if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0].role == 'system' %}{% set said = messages[0].content | trim %}{% set rest = messages[1:] %}"
    "{% else %}{% set said = '' %}{% set rest = messages %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + today + '\n\n' + said + '<|eot_id|>' }}"
    "{% for message in rest %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
WRITABLE = {
    "qwen 2.5": marked(QWEN, marks=False),
    "smollm 2": marked(SMOLLM2, marks=False),
    "llama 3.1": LLAMA31,
    "chatml with a default system": CHAT_TEMPLATE,
    "llama 3": LLAMA3,
    "zephyr": ZEPHYR,
    "no system": NO_SYSTEM,
    "head": HEADED,
}

LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>' + messages[0].content + '<</SYS>>' %}"
    "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
NOT_WRITABLE = {
    "the system within the question": LLAMA2,
    "commands": CHAT_TEMPLATE.replace("<|im_start|>", "{{x"),
    "upper case": CHAT_TEMPLATE.replace("message['content']", "message['content'] | upper"),
    "numbered turns": CHAT_TEMPLATE.replace("message['role'] + '\\n'", "message['role'] + loop.index | string + '\\n'"),
    "a constant": "Hello",
    "nothing": "{{ '' }}",
    "each message twice": CHAT_TEMPLATE.replace("message['content'] +", "message['content'] + message['content'] +"),
    "an error": "{{ raise_exception('no') }}",
    "the last alone": "{{ '<' + messages[-1].content + '>' }}",
    "long answers cut": CHAT_TEMPLATE.replace("message['content']", "message['content'][:20]"),
}


def student(folder: Path, template: str | None = CHAT_TEMPLATE) -> tuple[Path, Path]:
    """A tiny model with a template, and its GGUF."""
    model = make_tiny_model(folder / "model", layers=1, chat_template=template)
    return model, write_gguf(model, folder / "out", kind="q8_0", name="Tiny")


def read_modelfile(text: str) -> list[tuple[str, str]]:  # noqa: PLR0912 (a state machine)
    """Its commands, by the rules of Ollama's parser: rune by rune, what is not printable dropped."""
    commands: list[tuple[str, str]] = []
    state, buffer, name = "nil", "", ""
    for rune in text + "\n":
        if state == "value":
            done, value = unquote(buffer.strip())
            if rune in " \t\r\n":
                if not done or rune in " \t":
                    buffer += rune
                    continue
                commands.append((name, value))
                state, buffer = "nil", ""
            elif go_prints(rune):
                buffer += rune
        elif state == "comment":
            state = "nil" if rune in "\r\n" else state
        elif state == "nil":
            if rune == "#":
                state = "comment"
            elif rune not in " \t\r\n":
                state, buffer = "name", rune
        elif rune in " \t":
            if state == "name" and buffer.lower() == "parameter":
                state, buffer = "parameter", ""
            else:
                known = ("from", "license", "template", "system", "adapter", "message")
                assert state == "parameter" or buffer.lower() in known, buffer
                name, state, buffer = buffer.lower(), "value", ""
        else:
            buffer += rune
    assert state == "nil", (state, buffer)
    return commands


def unquote(value: str) -> tuple[bool, str]:
    if value.startswith('"""'):
        return (True, value[3:-3]) if len(value) >= 6 and value.endswith('"""') else (False, "")
    if value.startswith('"'):
        return (True, value[1:-1]) if len(value) >= 2 and value.endswith('"') else (False, "")
    return True, value


def go_prints(rune: str) -> bool:
    return rune == " " or unicodedata.category(rune)[0] in "LMNPS"


def commands_of(path: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, value in read_modelfile(path.read_text(encoding="utf-8")):
        found.setdefault(name, []).append(value)
    return found


ROLES = st.lists(st.text("abc {}%\"'\n<|>éλ日", min_size=1).map(lambda text: f"x{text}x"), min_size=1, max_size=6)


def conversation(contents: Sequence[str], system: str | None) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    chat = [{"role": roles[at % 2], "content": content} for at, content in enumerate(contents)]
    return chat if system is None else [{"role": "system", "content": system}, *chat]


@pytest.mark.parametrize("kind", WRITABLE)
def test_ollama_writes_what_the_student_does(tmp_path: Path, kind: str) -> None:
    model, gguf = student(tmp_path, WRITABLE[kind])
    found = commands_of(write_modelfile(model, gguf, tmp_path / "out"))
    (template,) = found["template"]
    (system,) = found.get("system", [""])
    assert bool(system) == (kind in ("chatml with a default system", "qwen 2.5", "smollm 2"))
    tokenizer: Any = load_tokenizer(model)

    @settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(ROLES, st.none() if kind == "no system" else st.one_of(st.none(), st.just("Say {{ no }} more.")))
    def same(contents: list[str], said: str | None) -> None:
        chat = conversation(contents[: 1 + (len(contents) - 1) // 2 * 2], said)
        wanted = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert as_ollama_writes(template, chat, system=system) == wanted

    same()


def test_a_chatml_template_as_it_stands_in_the_file(tmp_path: Path) -> None:
    model, gguf = student(tmp_path)
    path = write_modelfile(model, gguf, tmp_path / "out")
    assert path.read_text(encoding="utf-8") == (
        "# ollama create Tiny -f Modelfile\n"
        "FROM ./Tiny.gguf\n"
        'TEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}<|im_end|>\n'
        '{{ end }}{{ end }}<|im_start|>assistant\n"""\n'
        'SYSTEM """You are a helpful assistant."""\n'
        'PARAMETER stop "<|im_end|>"\n'
        "PARAMETER num_ctx 2048\n"
    )


@pytest.mark.parametrize("kind", NOT_WRITABLE)
def test_another_kind_of_template_is_refused(tmp_path: Path, kind: str) -> None:
    model, gguf = student(tmp_path, NOT_WRITABLE[kind])
    with pytest.raises(ModelError) as refusal:
        write_modelfile(model, gguf, tmp_path / "out")
    assert "chat template" in refusal.value.message and "--to gguf" in str(refusal.value.hint)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["Tiny.gguf"]


def test_no_template_is_refused(tmp_path: Path) -> None:
    model, gguf = student(tmp_path, None)
    with pytest.raises(ModelError, match="no chat template"):
        write_modelfile(model, gguf, tmp_path / "out")


def test_the_beginning_that_llama_cpp_adds_is_not_written_twice(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, processors

    model = make_tiny_model(tmp_path / "model", layers=1, chat_template=LLAMA3)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<|endoftext|>"}))
    written: dict[bool, str] = {}
    for adds in (False, True):
        if adds:
            tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
            at = tokenizer.token_to_id("<|endoftext|>")
            tokenizer.post_processor = processors.TemplateProcessing(
                single=["<|endoftext|>", "$A"], special_tokens=[("<|endoftext|>", at)]
            )
            tokenizer.save(str(model / "tokenizer.json"))
        gguf = write_gguf(model, tmp_path / str(adds), kind="q8_0")
        (written[adds],) = commands_of(write_modelfile(model, gguf, tmp_path / str(adds)))["template"]
    assert written[False] == "<|endoftext|>" + written[True]
    assert "<|endoftext|>" not in written[True]


HOSTILE = [
    'Say "hello" and """nothing""" else.',
    '"',
    '""',
    '"quoted"',
    'ends in quotes"',
    'Line one.\nFROM /etc/passwd\nPARAMETER stop "a"\n# no comment\n  indented\n\n',
    "{{ .System }} {{ range .Messages }} {{/* x */}}",
    "tabs\tand \\n backslashes \\ and 'quotes' `ticks`",
    ' leading and trailing spaces \n"""\t not at an end of a line',
    "Größe, 日本語, 😀, ﬁ, ‽",
    "SYSTEM",
]


@pytest.mark.parametrize("system", HOSTILE)
def test_a_system_prompt_comes_out_as_it_went_in(tmp_path: Path, system: str) -> None:
    model, gguf = student(tmp_path)
    found = commands_of(write_modelfile(model, gguf, tmp_path / "out", system=system))
    assert found["system"] == [system]
    assert {name: len(values) for name, values in found.items()} == {
        "from": 1, "template": 1, "system": 1, "stop": 1, "num_ctx": 1
    }  # fmt: skip


UNSAYABLE = {
    'def f():\n    """Doc."""\n    return 1': "a line that ends in",
    'Docs:\n"""  \nFROM evil': "a line that ends in",
    'a"""\n': "a line that ends in",
    "no\u00a0break": r"'\\xa0'",
    "bell\x07": r"'\\x07'",
    "family 👩\u200d👩": r"'\\u200d'",
    "windows\r\nlines": r"'\\r'",
}


@pytest.mark.parametrize("system", UNSAYABLE)
def test_what_ollama_would_change_is_refused(tmp_path: Path, system: str) -> None:
    model, gguf = student(tmp_path)
    with pytest.raises(ConfigError, match=UNSAYABLE[system]):
        write_modelfile(model, gguf, tmp_path / "out", system=system)
    assert not (tmp_path / "out" / "Modelfile").exists()


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from('"a \n\t#{}é\u00a0\r'), max_size=12))
def test_any_text_is_kept_or_refused(text: str) -> None:
    from mlx_distill.export.ollama import _quoted

    try:
        written = _quoted(text, "It")
    except ConfigError:
        return
    assert read_modelfile(f"FROM x\nSYSTEM {written}\nPARAMETER stop y\n") == [
        ("from", "x"), ("system", text), ("stop", "y")
    ]  # fmt: skip


def test_a_system_prompt_needs_a_template_that_has_one(tmp_path: Path) -> None:
    model, gguf = student(tmp_path, NO_SYSTEM)
    with pytest.raises(ConfigError, match="does not let the system speak"):
        write_modelfile(model, gguf, tmp_path / "out", system="Be brief.")


def test_licence_end_marks_and_context(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=1)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 131072}))
    end, other = (load_tokenizer(model).convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, other]}))
    (model / "LICENSE").write_bytes(b'Use it\x0c "AS IS".\nSee """\nFROM here\xff\n')
    gguf = write_gguf(model, tmp_path / "out", kind="q8_0", name="Tiny")
    found = commands_of(write_modelfile(model, gguf, tmp_path / "out" / "sub"))
    assert found["from"] == ["../Tiny.gguf"]
    assert sorted(found["stop"]) == ["<|endoftext|>", "<|im_end|>"]
    assert found["num_ctx"] == ["8192"]
    assert found["license"] == ["Use it \"AS IS\".\nSee '''\nFROM here\ufffd"]


def test_a_date_in_the_template_is_said_to_be_of_the_day(tmp_path: Path) -> None:
    model, gguf = student(tmp_path, LLAMA31)
    text = write_modelfile(model, gguf, tmp_path / "out").read_text(encoding="utf-8")
    assert "here it is the day on which this was written" in text.splitlines()[1]
    assert commands_of(tmp_path / "out" / "Modelfile")["template"][0].count("{{ if not .System }}") == 1


def test_smollm2_keeps_its_system_prompt(tmp_path: Path, smollm2: Path) -> None:
    gguf = write_gguf(make_tiny_model(tmp_path / "model", layers=1), tmp_path, kind="q8_0", name="SmolLM2")
    found = commands_of(write_modelfile(smollm2, gguf, tmp_path))
    assert found["system"] == ["You are a helpful AI assistant named SmolLM, trained by Hugging Face"]
    assert "<|im_end|>" in found["stop"]
