"""Read a data set in mlx-lm's layouts and turn its rows into tokens with a loss mask.

Three layouts, told apart by a row's keys, as mlx-lm does: chat (`messages`, perhaps `tools`), completions
(`prompt`, `completion`) and text (`text`). A chat carries loss on every assistant turn and on nothing else; a
completion on the completion; a text on all of it. Where a turn begins and ends is read off the chat template's own
rendering, so what is trained is what will be generated.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2.exceptions import TemplateError
from pydantic import ValidationError
from pydantic_core import from_json

from mlx_distill.batches import TokenRow
from mlx_distill.errors import InputError
from mlx_distill.layout import DataFolder, explain, file_sha256
from mlx_distill.progress import SILENT, Progress
from mlx_distill.records import ChatRow, Message
from mlx_distill.run_records import SplitSummary

_LAYOUTS = 'a row is {"messages": [...]}, {"prompt": ..., "completion": ...} or {"text": ...}'

#: A content that no template and no chat has, to see where a template puts it.
_PLACEHOLDER = "mlx-distill:content"


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
class Skipped:
    """A row that is not trained on, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class TokenSplit:
    """A tokenised split.

    Attributes:
        path: The file it came from.
        rows: Every row with something to learn.
        lines: The line of each row.
        skipped: The others.
    """

    path: Path
    rows: Sequence[TokenRow]
    lines: Sequence[int]
    skipped: Sequence[Skipped]

    def summary(self) -> SplitSummary:
        """Its size and hash."""
        return SplitSummary(
            rows=len(self.rows),
            tokens=sum(len(r.tokens) for r in self.rows),
            target_tokens=sum(r.target_tokens for r in self.rows),
            sha256=file_sha256(self.path),
            skipped=len(self.skipped),
        )


def read_split(path: Path) -> list[Row]:
    """Read a JSONL file in one of mlx-lm's layouts.

    Raises:
        InputError: It is missing or empty, or a line is malformed; says which and why.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            "no such file.",
            path=path,
            hint="Make one:  mlx-distill collect --help  (or point --data at your own folder)",
        ) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}.", path=path) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"not UTF-8: {error.reason}.", path=path, line=place) from None
    # Only line feeds end a line: JSON allows the other separators that splitlines() knows inside a string.
    lines = enumerate(io.StringIO(text, newline=None), start=1)
    rows = [_parse_row(line, path, number) for number, line in lines if line.strip()]
    if not rows:
        raise InputError("the file has no rows.", path=path)
    return rows


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


def tokenise_split(path: Path, tokenizer: Any, *, max_length: int, progress: Progress = SILENT) -> TokenSplit:
    """Read and tokenise a split.

    Args:
        path: A JSONL file.
        tokenizer: A fast transformers tokenizer with a chat template.
        max_length: Longer rows, in tokens, are left out whole: a cut answer teaches never to finish.

    Raises:
        InputError: The file or a row cannot be used.
    """
    raw = read_split(path)
    rows: list[TokenRow] = []
    lines: list[int] = []
    skipped: list[Skipped] = []
    with progress.task(f"Tokenising {path.name}", total=len(raw), unit="rows") as bar:
        for item in raw:
            row = _tokenise(item, tokenizer, path)
            if len(row.tokens) > max_length:
                skipped.append(Skipped(item.line, f"{len(row.tokens)} tokens, more than max_length = {max_length}"))
            elif not row.loss_mask.any():
                skipped.append(Skipped(item.line, "nothing to learn: no assistant turn with text"))
            else:
                rows.append(row)
                lines.append(item.line)
            bar.advance()
    return TokenSplit(path, rows, lines, skipped)


def _tokenise(row: Row, tokenizer: Any, path: Path) -> TokenRow:
    if row.chat is None:
        return _tokenise_text(row.text or "", tokenizer)
    try:
        text, spans = assistant_spans(row.chat, tokenizer)
    except (TemplateError, TypeError, KeyError) as error:
        raise InputError(f"the student's chat template refuses this chat: {error}", path=path, line=row.line) from None
    except InputError as error:
        raise InputError(error.message, path=path, line=row.line, hint=error.hint) from None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], dtype=np.int64)
    mask = np.zeros(len(starts), dtype=np.bool_)
    for begin, end in spans:
        mask |= (starts >= begin) & (starts < end)
    mask[:1] = False
    return TokenRow(np.array(encoded["input_ids"], dtype=np.int32), mask)


def _tokenise_text(text: str, tokenizer: Any) -> TokenRow:
    tokens = list(tokenizer(text)["input_ids"])
    if not tokens or tokens[-1] != tokenizer.eos_token_id:
        tokens.append(tokenizer.eos_token_id)
    mask = np.ones(len(tokens), dtype=np.bool_)
    mask[0] = False
    return TokenRow(np.array(tokens, dtype=np.int32), mask)


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

    def render(turns: Sequence[dict[str, Any]], *, prompt: bool = False) -> str:
        return str(tokenizer.apply_chat_template(turns, tools=chat.tools, tokenize=False, add_generation_prompt=prompt))

    whole = render(messages)
    spans: list[tuple[int, int]] = []
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if at:
            before = render(messages[:at], prompt=True)
        else:
            before = render([{**message, "content": _PLACEHOLDER}]).partition(_PLACEHOLDER)[0]
        through = render(messages[: at + 1])
        if not (whole.startswith(through) and through.startswith(before)):
            raise InputError(
                f"the student's chat template renders turn {at + 1} differently once later turns follow.",
                hint="Split the conversation into rows that end with each assistant turn.",
            )
        spans.append((len(before), len(through)))
    return whole, spans


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


def require_train_split(folder: Path) -> None:
    """Refuse a folder without a `train.jsonl`, before anything dear is done.

    Raises:
        InputError: There is no such folder, or no such file in it.
    """
    hint = "Make one:  mlx-distill collect --help  (or point --data at your own folder)"
    if not folder.is_dir():
        raise InputError("no such folder; it needs a train.jsonl.", path=folder, hint=hint)
    if not DataFolder(folder).split("train").is_file():
        raise InputError("no such file.", path=DataFolder(folder).split("train"), hint=hint)


def load_splits(folder: Path, tokenizer: Any, *, max_length: int, progress: Progress = SILENT) -> dict[str, TokenSplit]:
    """Tokenise `train.jsonl` and, where they are there and not empty, `valid.jsonl` and `test.jsonl`.

    Raises:
        InputError: There is no such folder, no training row is left, or a file is malformed.
    """
    require_train_split(folder)
    files = DataFolder(folder)
    splits: dict[str, TokenSplit] = {}
    for name in ("train", "valid", "test"):
        path = files.split(name)
        if name == "train" or (path.exists() and path.stat().st_size > 0):
            split = tokenise_split(path, tokenizer, max_length=max_length, progress=progress)
            if split.skipped:
                first = split.skipped[0]
                progress.say(
                    f"{path}: {len(split.skipped)} of {len(split.rows) + len(split.skipped)} rows left out; "
                    f"the first is line {first.line}: {first.reason}."
                )
            if split.rows:
                splits[name] = split
    if "train" not in splits:
        raise InputError(
            "no row is left to train on.", path=files.split("train"), hint="Raise --max-length, or look at the rows."
        )
    return splits
