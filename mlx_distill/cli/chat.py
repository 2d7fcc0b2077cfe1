"""`mlx-distill chat`."""

from __future__ import annotations

import io
import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_distill.cli import exits
from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import ChatConfig
from mlx_distill.progress import Progress

if TYPE_CHECKING:
    from mlx_distill.chat.opening import Opened


@dataclass(frozen=True)
class Conversation(Summary):
    """What a conversation prints: itself, while it lasts. Only then is standard output its own.

    Attributes:
        opened: Where it is held.
    """

    opened: Opened = field(kw_only=True)

    def print(self, *, as_json: bool) -> None:
        """Hold it; exits 1 where lines of standard input came to nothing."""
        from mlx_distill.cli.chat_loop import Talk
        from mlx_distill.cli.chat_view import Paper

        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        session = self.opened.session
        remarks = Paper(sys.stderr)
        talk = Talk(session, self.opened.names, remarks if as_json else Paper(sys.stdout), remarks, quiet=as_json)
        talk.hold()
        if as_json:
            turns: list[dict[str, Any]] = [
                {**asdict(turn), "answers": {answer.contender: asdict(answer) for answer in turn.answers}}
                for turn in session.turns
            ]
            Summary({**self.data, "turns": turns}).print(as_json=True)
        if talk.failed:
            sys.exit(exits.FAILED)


@make_command(
    ChatConfig,
    examples="""
    mlx-distill chat adapters/mine
    mlx-distill chat adapters/mine --only distilled --temperature 0.7
    mlx-distill chat adapters/mine --json      (where standard input is no terminal, each line of it is a prompt)
    """,
    keeps="Of a conversation nothing is kept but what /save wrote.",
)
def command(config: ChatConfig, progress: Progress) -> Summary:
    """Talk with the base model and the distilled student side by side, both writing at once.

    The base is loaded once and the run's adapter put beside it, so nothing has to be fused first. Each remembers its
    own answers. Where standard input is no terminal, each line of it is a prompt.
    """
    from mlx_distill.chat.opening import open_chat

    opened = open_chat(config, progress)
    return Conversation(
        {
            "run": str(config.run),
            "models": opened.names,
            **config.model_dump(include={"max_tokens", "temperature", "seed"}),
        },
        opened=opened,
    )
