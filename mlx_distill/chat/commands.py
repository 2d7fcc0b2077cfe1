"""What can be typed into a conversation beside prompts: lines that begin with a slash."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_distill import layout
from mlx_distill.chat.session import Session
from mlx_distill.errors import FolderError, InputError

#: Command → what is typed after it, and what it does.
COMMANDS: dict[str, tuple[str, str]] = {
    "/help": ("", "Show this."),
    "/reset": ("", "Forget what was said, and begin another conversation."),
    "/system": ("TEXT", "Set the system prompt of all; without a text, take it away."),
    "/only": ("base|distilled|both", "Choose who answers from now on."),
    "/save": ("FILE", "Write each one's conversation as a row of JSONL, in mlx-lm's chat layout."),
    "/quit": ("", "End. So do Ctrl-D and Ctrl-C; while answers are written, Ctrl-C stops these alone."),
}


@dataclass(frozen=True)
class Obeyed:
    """What a command came to.

    Attributes:
        lines: To tell the user.
        quits: Whether the conversation is to end.
    """

    lines: tuple[str, ...] = ()
    quits: bool = False


def is_command(line: str) -> bool:
    """Whether a line is no prompt. A prompt that begins with a slash is typed with two."""
    return line.startswith("/") and not line.startswith("//")


def as_prompt(line: str) -> str:
    """The prompt that a line is."""
    return line[1:] if line.startswith("//") else line


def obey(session: Session, line: str) -> Obeyed:
    """Do what a command says.

    Raises:
        InputError: There is no such command, or what was typed after it makes no sense.
        FolderError: There is something where a conversation was to be saved.
        ResourceError: It cannot be written there.
    """
    name, _, rest = line.strip().partition(" ")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.4)
        raise InputError(
            f"There is no {name}" + (f"; did you mean {near[0]}?" if near else "."),
            hint="/help shows what there is. A prompt that begins with a slash is typed with two.",
        )
    rest = rest.strip()
    if rest and not COMMANDS[name][0]:
        raise InputError(f"{name} takes nothing after it.")
    return _DEEDS[name](session, rest)


def _help(_session: Session, _rest: str) -> Obeyed:
    rows = [(f"{name} {rest}".strip(), does) for name, (rest, does) in COMMANDS.items()]
    width = max(len(typed) for typed, _ in rows)
    lines = [f"{typed:<{width}}  {does}" for typed, does in rows]
    return Obeyed((*lines, "At a terminal, a line that ends in \\ goes on in the next."))


def _reset(session: Session, _rest: str) -> Obeyed:
    session.reset()
    return Obeyed(("Forgotten." + (" The system prompt stays." if session.system else ""),))


def _system(session: Session, rest: str) -> Obeyed:
    had = session.system
    session.system = rest or None
    if rest:
        return Obeyed(("The system prompt is set.",))
    return Obeyed(("The system prompt is taken away." if had else "There is no system prompt.",))


def _only(session: Session, rest: str) -> Obeyed:
    if rest == "both":
        session.asked = session.contenders
    elif rest in session.contenders:
        session.asked = (rest,)
    else:
        raise InputError("/only needs base, distilled or both.")
    return Obeyed((f"{' and '.join(session.asked)} will answer.",))


def _save(session: Session, rest: str) -> Obeyed:
    if not rest:
        raise InputError("/save needs the name of a file.")
    rows = [
        # The column beside the messages is passed over by whoever reads the layout.
        {"messages": [message.model_dump(exclude_none=True) for message in said], "contender": contender}
        for contender in session.contenders
        if (said := session.history(contender))
    ]
    if not rows:
        raise InputError("Nothing was said yet.")
    try:
        if "\0" in rest:
            raise ValueError("it holds a null character")
        path = Path(rest).expanduser()
        there = path.exists() or path.is_symlink()
    # A home that there is not is a RuntimeError; a name that is too long an OSError.
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{rest} cannot be the name of a file: {error}.") from None
    if there:
        raise FolderError(f"{path} exists.", hint="Choose another name: /save replaces nothing.")
    layout.write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return Obeyed((f"Saved {len(rows)} {'conversation' if len(rows) == 1 else 'conversations'} to {path}.",))


def _quit(_session: Session, _rest: str) -> Obeyed:
    return Obeyed(quits=True)


_DEEDS: dict[str, Callable[[Session, str], Obeyed]] = {
    "/help": _help,
    "/reset": _reset,
    "/system": _system,
    "/only": _only,
    "/save": _save,
    "/quit": _quit,
}
