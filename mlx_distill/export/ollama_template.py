"""A student's chat template in the language of Ollama's: Go's text/template.

Jinja is not translated. What the template writes before and after the content of each role is found by rendering
conversations with it; from that a Go template is written, and both are rendered on further conversations, which must
come out the same. A template that does not write a conversation turn by turn is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from mlx_distill.errors import ModelError

Role = Literal["system", "user", "assistant"]
Chat = Sequence[Mapping[str, str]]

_HINT = "Export it with --to gguf: llama.cpp and LM Studio read the template itself."

#: Contents that no template looks into, and that stand in no other text.
_MARKS = ("Qzfirstzq", "Qzsecondzq", "Qzthirdzq", "Qzfourthzq")
_SYSTEM_MARK = "Qzsystemzq"

#: Held against each other once the form is found. Ollama has no word for trimming: contents begin and end with text.
_SAMPLES: tuple[Chat, ...] = (
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "You answer in one word."}, {"role": "user", "content": "Is the sky blue?"}],
    [
        {"role": "user", "content": "def f(x):\n    return {{ x }}\n\nWhat does this do?"},
        {"role": "assistant", "content": "It returns a set of a set: {{ .System }} would fail."},
        {"role": "user", "content": 'Größe, 日本語, """quoted""", {% raw %} and a \\ backslash'},
    ],
    [
        {"role": "system", "content": "Line one.\n\n  Line two, indented."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ],
)


class Render(Protocol):
    """Writes a conversation by the student's own template."""

    def __call__(self, chat: Chat, *, asks: bool) -> str | None:
        """Write it.

        Args:
            asks: Whether the beginning of an answer is added.

        Returns:
            None where the template refuses the conversation.
        """


@dataclass(frozen=True)
class ChatForm:
    """How a template writes a conversation.

    Attributes:
        head: Before the first turn.
        turns: By role, what stands before and after the content. No system where the template refuses it.
        opening: The beginning of an answer.
        system: What it lets the system say where a conversation does not begin with it; empty for nothing.
        unled: Stands before the first turn where the system says nothing, and is no turn with `system` in it.
    """

    head: str
    turns: Mapping[Role, tuple[str, str]]
    opening: str
    system: str = ""
    unled: str = ""

    def go_template(self) -> str:
        """As Ollama reads it."""
        branches = "".join(
            f'{{{{ {"else " if at else ""}if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for at, (role, (before, after)) in enumerate(self.turns.items())
        )
        unled = f"{{{{ if not .System }}}}{self.unled}{{{{ end }}}}" if self.unled else ""
        return f"{self.head}{unled}{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}{self.opening}"


def find_form(render: Render, name: str, *, bos: str = "") -> ChatForm:
    """The form of a chat template.

    Args:
        render: Writes by it.
        name: Of the model, for messages.
        bos: What llama.cpp puts before every text itself, so that the template must not.

    Raises:
        ModelError: It has no such form, or one that Go's template language cannot write.
    """
    try:
        form = _take_apart(render, bos)
    except _FormlessError as error:
        raise ModelError(f"The chat template of {name} cannot be written for Ollama: {error}.", hint=_HINT) from None
    texts = [form.head, form.unled, form.opening, *(text for turn in form.turns.values() for text in turn)]
    if any("{{" in text or text.endswith("{") for text in texts):
        raise ModelError(f"The chat template of {name} writes '{{{{', which Ollama reads as a command.", hint=_HINT)
    for chat in _SAMPLES:
        if chat[0]["role"] == "system" and "system" not in form.turns:
            continue
        wanted = render(chat, asks=True)
        if wanted is None or bos + as_ollama_writes(form.go_template(), chat, system=form.system) != wanted:
            raise ModelError(
                f"The chat template of {name} does not write a conversation turn by turn, as one for Ollama would.",
                hint=_HINT,
            )
    return form


class _FormlessError(Exception):
    """A template that writes no turns; says why."""


def _take_apart(render: Render, bos: str) -> ChatForm:
    first, second, third, fourth = _MARKS
    talk = [_said("user", first), _said("assistant", second), _said("user", third), _said("assistant", fourth)]
    after_user = _pieces(render([_said("user", first)], asks=False), first)[-1]
    asked = _pieces(render([_said("user", first)], asks=True), first)[-1]
    start, to_answer, to_question, again, after_answer = _pieces(render(talk, asks=False), *_MARKS)
    before_user = _without(to_question, after_answer, "what stands before a question differs from turn to turn")
    before_answer = _without(to_answer, after_user, "what stands before an answer differs from turn to turn")
    if again != to_answer:
        raise _FormlessError("its turns differ")
    opening = _without(asked, after_user, "it ends a question otherwise where an answer is asked for")
    start = _without(start, bos, f"it does not begin with {bos}, which llama.cpp puts before every text")
    if not start.endswith(before_user):
        raise _FormlessError("its first turn differs from the others")
    start = start.removesuffix(before_user)
    turns: dict[Role, tuple[str, str]] = {
        "user": (before_user, after_user),
        "assistant": (before_answer, after_answer),
    }
    led = render([_said("system", _SYSTEM_MARK), _said("user", first)], asks=False)
    if led is None:
        return ChatForm(start, turns, opening)
    before_system, after_system, end = _pieces(led, _SYSTEM_MARK, first)
    before_system = _without(before_system, bos, f"it does not begin with {bos}")
    if not after_system.endswith(before_user) or end != after_user:
        raise _FormlessError("its turns differ where the system speaks first")
    after_system = after_system.removesuffix(before_user)
    turns = {"system": (before_system, after_system), **turns}
    if not start:
        return ChatForm("", turns, opening)
    if start.startswith(before_system) and start.removeprefix(before_system).endswith(after_system):
        said = start.removeprefix(before_system).removesuffix(after_system)
        # A turn of the system in which it says nothing cannot be asked for: Ollama leaves it out.
        return ChatForm("", turns, opening, system=said, unled="" if said else start)
    if before_system.startswith(start):
        return ChatForm(start, {**turns, "system": (before_system.removeprefix(start), after_system)}, opening)
    raise _FormlessError("what it writes before the first turn is no turn of the system")


def _said(role: Role, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _pieces(text: str | None, *marks: str) -> list[str]:
    """What stands before, between and after the marks."""
    if text is None:
        raise _FormlessError("it refuses a plain conversation")
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise _FormlessError("it does not write each message once, in order")
        pieces.append(before)
    return [*pieces, text]


def _without(text: str, beginning: str, otherwise: str) -> str:
    if not text.startswith(beginning):
        raise _FormlessError(otherwise)
    return text.removeprefix(beginning)


def as_ollama_writes(template: str, chat: Chat, *, system: str = "") -> str:
    """What Ollama makes of a conversation, by a template that uses no more than `ChatForm.go_template` does.

    Args:
        template: `if not .System`, `range .Messages`, `if eq .Role "…"`, `else if …`, `.Content` and `end`.
        system: Of the Modelfile: the first message of a conversation that does not begin with one of the system.
    """
    if system and chat[0]["role"] != "system":
        chat = [_said("system", system), *chat]
    parts = re.split(r"\{\{ (.*?) \}\}", template)
    before, after = parts.index("range .Messages"), len(parts) - 1
    written = [parts[0]]
    if before > 1 and not any(message["role"] == "system" and message["content"] for message in chat):
        written.append(parts[2])
    for message in chat:
        written += _branch(parts[before + 1 : after], message)
    return "".join([*written, parts[-1]])


def _branch(parts: Sequence[str], message: Mapping[str, str]) -> Iterator[str]:
    """The text of the branch that fits a message; of commands, at the odd places, and the text between them."""
    taken = ends = 0
    for at, part in enumerate(parts):
        if at % 2 == 0:
            if taken and not ends:
                yield part
        elif part == ".Content":
            if taken and not ends:
                yield message["content"]
        elif part == "end" or taken:
            ends = 1
        else:
            taken = int(part.rpartition("if eq .Role ")[2] == f'"{message["role"]}"')
