"""Prompt files: what a teacher is asked, read from TOML, JSONL or plain text.

Reads: a prompt file.  Writes: the same prompts as JSONL, one `Prompt` record a line.

- TOML: `format = 1`, a `[modifiers]` table (id → text) and `[[prompt]]` tables with `id`, `field`, `text` and
  `modifiers`. Each modifier named by a prompt makes a variation of it: id `BASE--MODIFIER`, text BASE, a blank
  line, MODIFIER, and the base's id as its family.
- JSONL: `Prompt` records; or objects with `prompt`, or with `messages` that hold one user turn (an answer after
  it is ignored). The last two get an id and a family from a hash of their text.
- Plain text: one prompt a line, ids as above; empty lines are skipped.

Texts are stripped. Two prompts with the same id, or with the same text after folding case and white space, are
refused. Near duplicates are not looked for here.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import ConfigDict, Field, ValidationError
from pydantic_core import from_json

from mlx_distill.errors import InputError
from mlx_distill.layout import explain, find_input, write_text
from mlx_distill.records import ChatRow, Prompt, Record, content_hash

#: Raised when a change makes the same file give other prompts.
CODE_FORMAT = 1

R = TypeVar("R", bound=Record)

#: What joins a base prompt's id and a modifier's in the id of a variation.
VARIATION = "--"

_ID_HASH_CHARACTERS = 16
_TEXT_SUFFIXES = ("", ".txt", ".text")
_TOML_PLACE = re.compile(r" \(at line (\d+), column (\d+)\)$")
_PROMPT_HEADER = re.compile(r"^\s*\[\[\s*prompt\s*\]\]", re.MULTILINE)

#: A prompt and the line it starts on; None where that cannot be told.
_Placed = tuple[Prompt, int | None]


class _PromptTable(Record):
    model_config = ConfigDict(strict=True)

    id: str
    text: str
    field: str = "general"
    modifiers: tuple[str, ...] = Field((), strict=False)


class _PromptFile(Record):
    model_config = ConfigDict(strict=True)

    format: Literal[1]
    modifiers: dict[str, str] = Field(default_factory=dict)
    prompt: list[dict[str, Any]] = Field(default_factory=list)


class _PromptRow(Record):
    """A row that holds a bare prompt; `completion` is mlx-lm's name for the answer, which is not needed here."""

    model_config = ConfigDict(strict=True)

    prompt: str
    completion: Any = None
    system: str | None = None
    id: str | None = None
    family: str | None = None
    field: str = "general"


def load_prompts(path: Path, *, modifiers: bool = True) -> list[Prompt]:
    """Read a prompt file.

    Args:
        path: `.toml`, `.jsonl`, or plain text (`.txt` or no suffix). A path of shipped data works from anywhere.
        modifiers: Whether variations are made (TOML) or kept (JSONL).

    Returns:
        The prompts in the order of the file, each base followed by its variations; at least one.

    Raises:
        InputError: The file is missing, empty, malformed, or holds a prompt twice; says where.
    """
    path = find_input(path)
    text = _read(path)
    suffix = path.suffix.lower()
    if suffix == ".toml":
        placed = _from_toml(path, text, modifiers=modifiers)
    elif suffix == ".jsonl":
        placed = [(p, line) for p, line in _from_jsonl(path, text) if modifiers or p.modifier is None]
    elif suffix in _TEXT_SUFFIXES:
        placed = list(_from_lines(path, text))
    else:
        raise InputError(
            f"{suffix} is not a kind of prompt file.", path=path, hint="Known kinds: .toml, .jsonl, .txt (one a line)."
        )
    if not placed:
        raise InputError("holds no prompts.", path=path, hint="One a line in a .txt file is enough.")
    _refuse_duplicates(path, placed)
    return [prompt for prompt, _ in placed]


def write_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    """Write prompts as JSONL, atomically; `load_prompts` reads them back as they are."""
    write_text(path, "".join(prompt.to_json() + "\n" for prompt in prompts))


def fold(text: str) -> str:
    """A text with case and white space folded: what two prompts must not share."""
    return " ".join(text.casefold().split())


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            "no such file.", path=path, hint="The prompts that ship with mlx-distill:  data/prompts/coding.toml"
        ) from None
    except IsADirectoryError:
        raise InputError("is a folder, not a prompt file.", path=path) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}.", path=path) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"not UTF-8: byte 0x{content[error.start]:02x}.",
            path=path,
            line=content.count(b"\n", 0, error.start) + 1,
        ) from None
    if not text.strip():
        raise InputError("is empty.", path=path, hint="One prompt a line in a .txt file is enough.")
    return text


def _from_toml(path: Path, text: str, *, modifiers: bool) -> list[_Placed]:
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = _TOML_PLACE.search(str(error))
        line = int(place[1]) if place else text.count("\n") + 1
        problem = _TOML_PLACE.sub("", str(error)).removesuffix(" (at end of document)")
        where = f"column {place[2]}" if place else "end of file"
        raise InputError(f"not valid TOML, {where}: {problem}.", path=path, line=line) from None
    except RecursionError:
        raise InputError("not valid TOML: nested too deeply.", path=path) from None
    file = _parse(_PromptFile, tree, path=path, line=None, what="the file")
    headers = [text.count("\n", 0, match.end()) + 1 for match in _PROMPT_HEADER.finditer(text)]
    # A header inside a prompt's own text would shift the count; then no line is better than a wrong one.
    lines: list[int | None] = [*headers] if len(headers) == len(file.prompt) else [None] * len(file.prompt)
    placed: list[_Placed] = []
    for number, (table, header) in enumerate(zip(file.prompt, lines, strict=True), start=1):
        entry = _parse(_PromptTable, table, path=path, line=header, what=f"[[prompt]] number {number}")
        known = file.modifiers if modifiers else None
        placed += [(prompt, header) for prompt in _expand(entry, known, path, header)]
    return placed


def _expand(entry: _PromptTable, modifiers: dict[str, str] | None, path: Path, line: int | None) -> Iterator[Prompt]:
    def make(**fields: Any) -> Prompt:
        return _parse(Prompt, {"family": entry.id, "field": entry.field, **fields}, path=path, line=line, what=entry.id)

    base = entry.text.strip()
    yield make(id=entry.id, text=base)
    for modifier in entry.modifiers if modifiers is not None else ():
        assert modifiers is not None
        if modifier not in modifiers:
            known = ", ".join(modifiers) or "none"
            raise InputError(f"{entry.id}: unknown modifier {modifier!r}; known: {known}.", path=path, line=line)
        yield make(
            id=f"{entry.id}{VARIATION}{modifier}",
            text=f"{base}\n\n{modifiers[modifier].strip()}",
            modifier=modifier,
        )


def _from_jsonl(path: Path, text: str) -> Iterator[_Placed]:
    for line, content in _lines(text):
        try:
            row = from_json(content)
        except ValueError as error:
            problem = re.sub(r" at line 1 (column \d+)$", r", \1", str(error))
            raise InputError(f"not valid JSON: {problem}.", path=path, line=line) from None
        if not isinstance(row, dict):
            raise InputError(f"expected an object, found {type(row).__name__}.", path=path, line=line)
        yield _from_row(row, path, line), line


def _from_row(row: dict[str, Any], path: Path, line: int) -> Prompt:
    if "messages" in row:
        return _from_chat(_parse(ChatRow, row, path=path, line=line, what="the row"), path, line)
    if "prompt" in row:
        entry = _parse(_PromptRow, row, path=path, line=line, what="the row")
        fields = entry.model_dump(include={"id", "family", "field", "system"}, exclude_none=True)
        return _named(entry.prompt, path, line, **fields)
    if "text" in row and isinstance(row["text"], str):
        row = {**row, "text": row["text"].strip()}
    if "id" in row:
        row = {"family": row["id"], **row}
    return _parse(Prompt, row, path=path, line=line, what="the row")


def _from_chat(row: ChatRow, path: Path, line: int) -> Prompt:
    turns = list(row.messages)
    system = turns.pop(0).content if turns[0].role == "system" else None
    if turns and turns[-1].role == "assistant":
        turns.pop()
    if [turn.role for turn in turns] != ["user"] or turns[0].content is None:
        raise InputError(
            "messages must hold one user turn, and may hold a system text before it.", path=path, line=line
        )
    return _named(turns[0].content, path, line, **({"system": system} if system else {}))


def _from_lines(path: Path, text: str) -> Iterator[_Placed]:
    for line, content in _lines(text):
        yield _named(content, path, line), line


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their number. Split at line feeds alone: JSON may hold other separators."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


def _named(text: str, path: Path, line: int, **fields: str) -> Prompt:
    """A prompt whose id, unless it is given one, is a hash of what is asked."""
    text = text.strip()
    digest = content_hash([fields.get("system"), text])
    identity = fields.pop("id", None) or f"prompt-{digest[:_ID_HASH_CHARACTERS]}"
    whole = {"id": identity, "family": identity, "text": text, **fields}
    return _parse(Prompt, whole, path=path, line=line, what="the row")


def _parse(record: type[R], values: dict[str, Any], *, path: Path, line: int | None, what: str) -> R:
    try:
        return record.model_validate(values)
    except ValidationError as error:
        # A key that is missing is often one that is misspelt: the misspelt one says more.
        problem = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(key, record.model_fields, n=1)
            known = f"did you mean {near[0]}?" if near else f"known: {', '.join(record.model_fields)}"
            raise InputError(f"{what}: unknown key {key} ({known})", path=path, line=line) from None
        if problem["type"] == "missing":
            raise InputError(f"{what}: {key} is missing.", path=path, line=line) from None
        raise InputError(f"{what}: {explain(error)}.", path=path, line=line) from None


def _refuse_duplicates(path: Path, placed: list[_Placed]) -> None:
    ids: dict[str, _Placed] = {}
    texts: dict[str, _Placed] = {}
    for prompt, line in placed:
        for seen, key, what in ((texts, fold(prompt.text), "the same text as"), (ids, prompt.id, "the same id as")):
            first, first_line = seen.setdefault(key, (prompt, line))
            if first is not prompt:
                where = f"{path}:{first_line}" if first_line else str(path)
                raise InputError(
                    f"prompt {prompt.id} has {what} {first.id} at {where}.",
                    path=path,
                    line=line,
                    hint="Take one of the two out.",
                )
