"""What tests of conversations share: sessions that remember nothing yet, and what was said in them."""

from __future__ import annotations

from typing import Any

from mlx_distill.backends.mlx.chatting import Voice
from mlx_distill.chat.session import Answer, Session
from mlx_distill.records import Contender

PROMPTS = ("add two numbers", "for item in items", "and now the class Node, and a word more")


def talk(voices: tuple[Voice, Voice], **options: Any) -> Session:
    """A session that remembers nothing."""
    for voice in voices:
        voice.forget()
    return Session({"base": voices[0], "distilled": voices[1]}, **{"max_tokens": 12, **options})


def alone(voice: Voice, **options: Any) -> Session:
    voice.forget()
    return Session({"base": voice}, **{"max_tokens": 12, **options})


def answers(session: Session, prompt: str, **options: Any) -> dict[Contender, Answer]:
    return {event.contender: event for event in session.ask(prompt, **options) if isinstance(event, Answer)}


def said(found: dict[Contender, Answer]) -> dict[Contender, tuple[str, str, int]]:
    return {contender: (answer.text, answer.stop, answer.tokens) for contender, answer in found.items()}


def texts(session: Session) -> list[dict[Contender, str]]:
    return [{answer.contender: answer.text for answer in turn.answers} for turn in session.turns]
