"""A teacher that answers from a record: no key, no network, the same answer every time.

A record is a folder of Markdown files, or a JSONL file:

- Markdown: TOML front matter between two `+++` lines, with `id` and `prompt`, then the answer as it stands (the
  line feed that ends the file is not part of it). A folder that has a folder `answers` stands for that one.
- JSONL: `{"prompt": …, "answer": …}` with an optional `system`, or mlx-lm's chat rows, whose last message is the
  answer to those before it.

A request is answered when its messages are, to the letter, those of the record; a system text counts only where
the record has one. It does not count tokens, and it ignores `max_tokens`: an answer is never cut.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import from_json

from mlx_distill.errors import InputError, TeacherError
from mlx_distill.layout import explain, find_input
from mlx_distill.manifest import TeacherTerms
from mlx_distill.records import ChatRow, Message, Record, Reply, Request, content_hash

R = TypeVar("R", bound=Record)

_FRONT_MATTER = re.compile(r"\A\+\+\+[ \t]*\n(?P<toml>.*?\n)\+\+\+[ \t]*\n(?P<answer>.*)\Z", re.DOTALL)
_TERMS_FILE = "TERMS.toml"
_ANSWERS_FOLDER = "answers"
_REVISION_CHARACTERS = 12


class _FrontMatter(Record):
    id: str
    prompt: str


class _Pair(Record):
    prompt: str
    answer: str
    system: str | None = None
    id: str | None = None


class _Terms(Record):
    licence: str
    summary: str
    url: str | None = None


@dataclass(frozen=True)
class Recording:
    """One recorded answer.

    Attributes:
        conversation: Role and content of each turn before it.
        place: File and line.
    """

    system: str | None
    conversation: tuple[tuple[str, str | None], ...]
    answer: str
    place: str

    @property
    def key(self) -> tuple[str | None, tuple[tuple[str, str | None], ...]]:
        return self.system, self.conversation


class RecordedTeacher:
    """Answers from the record at a path.

    Args:
        path: The folder or JSONL file. A path of shipped data works from anywhere.

    Raises:
        InputError: It is missing, empty, malformed, or answers one prompt in two ways.
    """

    def __init__(self, path: str) -> None:
        self.spec = f"recorded:{path}"
        root = find_input(Path(path))
        self._terms = _load_terms(root, self.spec)
        self._answers: dict[tuple[str | None, tuple[tuple[str, str | None], ...]], Recording] = {}
        for recording in recordings(root):
            first = self._answers.setdefault(recording.key, recording)
            if first.answer != recording.answer:
                raise InputError(f"{recording.place} and {first.place} answer the same prompt in two ways.")
        if not self._answers:
            raise InputError("holds no recorded answers.", path=root)
        #: Changes with the answers, so that an edited one is not taken for the one collected before.
        self.revision = content_hash(
            sorted(content_hash([r.system, r.conversation, r.answer]) for r in self._answers.values())
        )[:_REVISION_CHARACTERS]

    def __len__(self) -> int:
        return len(self._answers)

    def terms(self) -> TeacherTerms:
        """What the record's `TERMS.toml` says, if it has one."""
        return self._terms

    async def ask(self, request: Request) -> Reply:
        """Look the conversation up.

        Raises:
            TeacherError: It is not in the record; names the prompt.
        """
        conversation = tuple((message.role, message.content) for message in request.messages)
        found = self._answers.get((request.system, conversation)) or self._answers.get((None, conversation))
        if found is None:
            raise TeacherError(
                f"prompt {request.prompt_id} has no answer in {self.spec}.",
                hint="A record answers only the exact text that was recorded.",
            )
        return Reply(text=found.answer, stop="end", model=self.spec)

    async def close(self) -> None:
        """Nothing is held open."""


def recordings(root: Path) -> Iterator[Recording]:
    if root.is_dir():
        folder = root / _ANSWERS_FOLDER if (root / _ANSWERS_FOLDER).is_dir() else root
        return _from_folder(folder)
    if root.suffix.lower() != ".jsonl" and root.exists():
        raise InputError("recorded answers are a folder of Markdown files, or a .jsonl file.", path=root)
    return _from_jsonl(root)


def _from_folder(folder: Path) -> Iterator[Recording]:
    for path in sorted(folder.glob("*.md")):
        if path.name == "README.md":
            continue
        text = _read(path)
        match = _FRONT_MATTER.match(text)
        if match is None:
            raise InputError("expected TOML front matter between two lines of +++, then the answer.", path=path, line=1)
        try:
            head = _FrontMatter.model_validate(tomllib.loads(match["toml"]))
        except tomllib.TOMLDecodeError as error:
            raise InputError(f"front matter is not valid TOML: {error}.", path=path) from None
        except ValidationError as error:
            raise InputError(f"front matter: {explain(error)}.", path=path) from None
        answer = match["answer"].removesuffix("\n")
        yield _recording(None, [Message(role="user", content=head.prompt.strip())], answer, path=path)


def _from_jsonl(path: Path) -> Iterator[Recording]:
    for line, content in enumerate(_read(path).split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = from_json(content)
        except ValueError as error:
            raise InputError(f"not valid JSON: {error}.", path=path, line=line) from None
        if isinstance(row, dict) and "messages" in row:
            turns = list(_validated(ChatRow, row, path, line).messages)
            system = turns.pop(0).content if turns[0].role == "system" else None
            answer = turns.pop() if turns else None
            if answer is None or not turns or answer.role != "assistant" or answer.content is None:
                raise InputError("a recorded conversation must end with the assistant's text.", path=path, line=line)
            yield _recording(system, turns, answer.content, path=path, line=line)
        else:
            pair = _validated(_Pair, row, path, line)
            turns = [Message(role="user", content=pair.prompt.strip())]
            yield _recording(pair.system, turns, pair.answer, path=path, line=line)


def _recording(
    system: str | None, turns: Iterable[Message], answer: str, *, path: Path, line: int | None = None
) -> Recording:
    if not answer.strip():
        raise InputError("the answer is empty.", path=path, line=line)
    conversation = tuple((turn.role, turn.content) for turn in turns)
    return Recording(system, conversation, answer, place=f"{path}:{line}" if line else str(path))


def _validated(record: type[R], row: object, path: Path, line: int) -> R:
    try:
        return record.model_validate(row)
    except ValidationError as error:
        raise InputError(
            f"{explain(error)}.", path=path, line=line, hint='A row is {"prompt": …, "answer": …} or {"messages": […]}.'
        ) from None


def _load_terms(root: Path, spec: str) -> TeacherTerms:
    folder = root if root.is_dir() else root.parent
    # The folder `answers` and the one that holds it stand for the same record.
    candidates = [folder / _TERMS_FILE, folder / _ANSWERS_FOLDER / _TERMS_FILE]
    if folder.name == _ANSWERS_FOLDER:
        candidates.append(folder.parent / _TERMS_FILE)
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        return TeacherTerms(teacher=spec, licence="unknown", summary="Recorded answers; their terms are not stated.")
    try:
        terms = _Terms.model_validate(tomllib.loads(_read(path)))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"not valid TOML: {error}.", path=path) from None
    except ValidationError as error:
        raise InputError(f"{explain(error)}.", path=path) from None
    return TeacherTerms(teacher=spec, **terms.model_dump())


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(
            "no such file or folder.", path=path, hint="The answers that ship with mlx-distill:  recorded:data/starter"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8: {error.reason} at byte {error.start}.", path=path) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}.", path=path) from None
