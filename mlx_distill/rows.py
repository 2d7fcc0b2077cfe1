"""Rows of a data set in mlx-lm's layouts: read as a stream, and rendered as the student will see them.

Three layouts, told apart by a row's keys, as mlx-lm does: chat (`messages`, perhaps `tools`), completions
(`prompt`, `completion`) and text (`text`). Where an assistant's turn begins and ends is read off the chat template's
own rendering, so what is trained is what will be generated.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from jinja2.exceptions import TemplateError
from pydantic import ValidationError
from pydantic_core import from_json

from mlx_distill.errors import InputError
from mlx_distill.layout import explain
from mlx_distill.records import ChatRow, Message

#: What to do where there is no data set.
MAKE_ONE = "Make one:  mlx-distill collect --help  (or point --data at your own folder)"

_LAYOUTS = 'a row is {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'

#: A content that no template and no chat has, to see where a template puts it.
_PLACEHOLDER = "mlx-distill:content"

#: What a template takes for today. The real one would make other tokens of the same row every day, so that a run that
#: goes on tomorrow would train on other data. Any day will do: this is the one that Llama 3.2's own template falls back
#: to where it is told none.
TODAY = datetime(2024, 7, 26)

#: What `strftime` writes for that day, by directive.
_DATE_PARTS = {
    f"%{way}": TODAY.strftime(f"%{way}")
    for way in (*"aAbBcCdDeFgGhHIjmMnpRStTuUVwWxXyYzZf", "-d", "-H", "-I", "-j", "-m", "-M", "-S", "-y")
}

#: Put before a template, a macro takes the place of the function: transformers hands no functions on to templates. The
#: line feed at its end belongs to the tag before it.
_DATED = (
    "{%- macro strftime_now(format) %}{% for text in format.split('%%') %}{{ '' if loop.first else '%' }}"
    "{% set ns = namespace(text=text) %}{% for way, value in mlx_distill_date_parts.items() %}"
    "{% set ns.text = ns.text.replace(way, value) %}{% endfor %}{{ ns.text }}{% endfor %}{% endmacro %}\n"
)

#: What the code of a template raises on a chat that it was not written for.
_TEMPLATE_ERRORS = (TemplateError, TypeError, KeyError, ValueError, AttributeError, IndexError)


class Digest(Protocol):
    """A hash under way, as of `hashlib`."""

    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True)
class Row:
    """A row as written: a chat, or a text.

    Attributes:
        line: Its line in the file, counted from 1.
    """

    line: int
    chat: ChatRow | None = None
    text: str | None = None


@dataclass(frozen=True)
class RenderedRow:
    """A row as one text.

    Attributes:
        line: Its line in the file, counted from 1.
        spans: Where it carries loss, as [begin, end) in characters; None for a row of text, which is learned whole.
    """

    line: int
    text: str
    spans: Sequence[tuple[int, int]] | None


def read_rows(path: Path, *, digest: Digest | None = None) -> Iterator[Row]:
    """Read a JSONL file in one of mlx-lm's layouts, a line at a time.

    Args:
        digest: Given every byte of the file, as it is read.

    Raises:
        InputError: The file is missing or empty, or a line is malformed; says which and why. Raised where the
            iteration gets there: all rows before it are good.
    """
    found = False
    for number, line in _lines(path, digest):
        if line.strip():
            found = True
            yield _parse_row(line, path, number)
    if not found:
        raise InputError("the file has no rows.", path=path)


def _lines(path: Path, digest: Digest | None) -> Iterator[tuple[int, str]]:
    try:
        # As bytes, only line feeds end a line: JSON allows the other separators of Unicode inside a string.
        with path.open("rb") as file:
            for number, content in enumerate(file, start=1):
                if digest is not None:
                    digest.update(content)
                line = content.removeprefix(codecs.BOM_UTF8) if number == 1 else content
                try:
                    text = line.decode()
                except UnicodeDecodeError as error:
                    raise InputError(f"not UTF-8: {error.reason}.", path=path, line=number) from None
                yield number, text
    except OSError as error:
        raise unreadable(error, path) from None


def unreadable(error: OSError, path: Path) -> InputError:
    """What to say of a split that cannot be read."""
    if isinstance(error, FileNotFoundError):
        return InputError("no such file.", path=path, hint=MAKE_ONE)
    return InputError(f"cannot be read: {error.strerror}.", path=path)


def _parse_row(line: str, path: Path, number: int) -> Row:
    try:
        value = from_json(line)
    except ValueError as error:
        reason = str(error).replace(" at line 1 column ", " at column ")
        raise InputError(f"not valid JSON: {reason}", path=path, line=number) from None
    if not isinstance(value, dict):
        raise InputError(f"expected a JSON object: {_LAYOUTS}", path=path, line=number)
    if "prompt" in value and "completion" in value:
        turns = [{"role": "user", "content": value["prompt"]}, {"role": "assistant", "content": value["completion"]}]
        value = {**value, "messages": turns}
    if "messages" not in value:
        if isinstance(value.get("text"), str):
            return Row(number, text=value["text"])
        raise InputError(f"unknown layout: {_LAYOUTS}", path=path, line=number)
    try:
        # Further columns are the user's own; mlx-lm passes over them too.
        return Row(number, chat=ChatRow.model_validate({k: value[k] for k in ("messages", "tools") if k in value}))
    except ValidationError as error:
        raise InputError(explain(error), path=path, line=number) from None


def render_row(row: Row, tokenizer: Any, path: Path) -> RenderedRow:
    """A row as the text that is tokenised.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        path: Of the file, for errors.

    Raises:
        InputError: The chat template refuses it or hides where a turn is, or a text has no token to end with.
    """
    if row.chat is None:
        if tokenizer.eos_token_id is None:
            raise InputError("the student's tokenizer names no token that ends a text.", path=path, line=row.line)
        return RenderedRow(row.line, row.text or "", None)
    try:
        text, spans = assistant_spans(row.chat, tokenizer)
    except InputError as error:
        raise InputError(error.message, path=path, line=row.line, hint=error.hint) from None
    except _TEMPLATE_ERRORS as error:
        raise InputError(f"the student's chat template refuses this chat: {error}", path=path, line=row.line) from None
    return RenderedRow(row.line, text, spans)


def assistant_spans(chat: ChatRow, tokenizer: Any) -> tuple[str, list[tuple[int, int]]]:
    """Render a chat, and find where its assistant turns stand in the text.

    A turn begins where the rendering of all before it, with the generation prompt, ends; and ends where the
    rendering up to and with it ends. It thus includes the mark that ends a turn, which has to be learned. A chat that
    the assistant opens has nothing before it to render: there the turn begins where its content does.

    Returns:
        The text, and the span [begin, end) in characters of every assistant turn.

    Raises:
        InputError: The template writes earlier turns differently once later ones follow, so that a turn's place
            cannot be told.
    """
    messages = [as_template_message(m) for m in chat.messages]
    dated = _dated(tokenizer.get_chat_template(tools=chat.tools))

    def render(turns: Sequence[dict[str, Any]], *, prompt: bool = False) -> str:
        options = {"tools": chat.tools, "tokenize": False, "add_generation_prompt": prompt, **dated}
        return str(tokenizer.apply_chat_template(turns, **options))

    whole = render(messages)
    spans: list[tuple[int, int]] = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if at:
            before = render(messages[:at], prompt=True)
        else:
            before = render([{**message, "content": _PLACEHOLDER}]).partition(_PLACEHOLDER)[0]
        through = render(messages[: at + 1]) if at + 1 < len(messages) else whole
        if not (whole.startswith(through) and through.startswith(before)):
            raise InputError(
                f"the student's chat template renders turn {at + 1} differently once later turns follow.",
                hint="Split the conversation into rows that end with each assistant turn.",
            )
        spans.append((len(before), len(through)))
    return whole, spans


def _dated(template: str) -> dict[str, Any]:
    """What to render a template with, so that a date in it is `TODAY`."""
    if "strftime_now" not in template:
        return {}
    return {"chat_template": _DATED + template, "mlx_distill_date_parts": _DATE_PARTS}


def as_template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: `content` always there, tool arguments as an object."""
    value: dict[str, Any] = {"content": "", **message.model_dump(exclude_none=True)}
    for call in value.get("tool_calls", []):
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except json.JSONDecodeError:
                continue
    return value
