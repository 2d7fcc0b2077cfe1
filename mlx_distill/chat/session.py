"""A conversation that two models hold side by side, each with its own answers in mind.

A session is told what was typed and gives events; who draws them is not its business.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mlx_distill.errors import InputError, MlxDistillError
from mlx_distill.records import Contender, Message

if TYPE_CHECKING:
    from mlx_distill.backends.mlx.chatting import Step, Voice

#: Why an answer is over: ended by the model, cut by the token limit or by the end of the context, or stopped.
Ending = Literal["end", "length", "context", "stopped"]


@dataclass(frozen=True)
class Piece:
    """What an answer goes on with; all pieces of an answer are its text, unless a tokenizer rewrites its beginning."""

    contender: Contender
    text: str


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        tokens: Written, the end mark not counted.
        seconds: That its own model took, the prompt included.
        prompt_tokens: Of the conversation up to the answer.
        remembered_tokens: How many of these were read in earlier turns, and not again.
    """

    contender: Contender
    text: str
    tokens: int
    seconds: float
    stop: Ending
    prompt_tokens: int
    remembered_tokens: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens written in the time that the model took."""
        return self.tokens / self.seconds if self.seconds else 0.0


Event = Piece | Answer


@dataclass
class Turn:
    """A prompt and what came of it.

    Attributes:
        conversation: Counted from 0; /reset begins another.
        answers: Those that are whole; in the end, in the order of the contenders.
        problem: Why there are no answers, or not all.
    """

    conversation: int
    prompt: str
    system: str | None
    answers: list[Answer] = field(default_factory=list)
    problem: str | None = None


class Session:
    """A conversation with one or two models, each of which knows its own answers alone.

    Args:
        voices: What speaks, by contender; all with the same tokenizer.
        max_tokens: Token limit of an answer.
        system: System prompt of all.
        asked: Who answers; None for all.
        temperature: 0 is greedy.
        seed: Of what is drawn. All draw the same in the same turn: what differs between them is not chance.

    Attributes:
        system: May be set at any time, and holds for the whole conversation from then on.
        asked: Who answers, in the order of the voices.
        turns: All of them, with those that were forgotten.
    """

    def __init__(
        self,
        voices: Mapping[Contender, Voice],
        *,
        max_tokens: int,
        system: str | None = None,
        asked: Sequence[Contender] | None = None,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._voices = dict(voices)
        self._max_tokens, self._temperature, self._seed = max_tokens, temperature, seed
        self._histories: dict[Contender, list[Message]] = {contender: [] for contender in self._voices}
        self._conversation = 0
        self._stopping = False
        self.system = system
        self.asked: tuple[Contender, ...] = tuple(asked or self._voices)
        self.turns: list[Turn] = []

    @property
    def contenders(self) -> tuple[Contender, ...]:
        """All who could be asked."""
        return tuple(self._voices)

    def history(self, contender: Contender) -> list[Message]:
        """The conversation as one of them knows it, with the system prompt; empty where nothing was said."""
        said = self._histories[contender]
        return [Message(role="system", content=self.system), *said] if said and self.system else list(said)

    def reset(self) -> None:
        """Forget all that was said. The system prompt stays."""
        for contender, voice in self._voices.items():
            self._histories[contender].clear()
            voice.forget()
        self._conversation += 1

    def stop(self) -> None:
        """End the answers under way at their next token. May be called from a signal handler."""
        self._stopping = True

    def ask(self, prompt: str, *, together: bool = True) -> Iterator[Event]:
        """Put a prompt to those who are asked.

        What an answer came to is part of the conversation, stopped or not; but one that was stopped before its first
        word leaves no trace.

        Args:
            together: Whether they answer at once, a token each in turn; else one after the other.

        Yields:
            Pieces as they come, and each answer when it is whole.

        Raises:
            InputError: The prompt does not fit into the model's context with what was said before, is no text, or the
                model's chat template refuses it. Nothing was said then.
            ResourceError: The machine is out of memory. Answers that were whole before are kept.
        """
        self._stopping = False
        turn = Turn(self._conversation, prompt, self.system)
        self.turns.append(turn)
        try:
            answering = [self._begin(contender, prompt) for contender in self.asked]
            for group in [answering] if together else [[one] for one in answering]:
                for event in self._take_turns(group):
                    if isinstance(event, Answer):
                        self._keep(prompt, event)
                        turn.answers.append(event)
                    yield event
        except MlxDistillError as error:
            turn.problem = error.message
            raise
        finally:
            turn.answers.sort(key=lambda answer: self.asked.index(answer.contender))

    def _begin(self, contender: Contender, prompt: str) -> _Answering:
        system = [Message(role="system", content=self.system)] if self.system else []
        voice = self._voices[contender]
        try:
            f"{self.system}{prompt}".encode()
            tokens = voice.encode([*system, *self._histories[contender], Message(role="user", content=prompt)])
        except UnicodeEncodeError:
            raise InputError("What was typed holds characters that are no text.") from None
        except InputError as error:
            raise InputError(
                f"{contender} cannot be asked: {error.message}",
                hint="/system without a text takes the system prompt away." if system else error.hint,
            ) from None
        room = self._max_tokens
        if voice.context is not None:
            room = min(room, voice.context - len(tokens))
        if room < 1:
            raise InputError(
                f"The conversation with {contender} is {len(tokens)} tokens long with this prompt, and the model's "
                f"context of {voice.context} leaves no room for an answer.",
                hint="/reset forgets what was said, and begins another.",
            )
        # The high half of a key of MLX's is the turn, the low half the seed: no two turns draw alike.
        steps = voice.answer(
            tokens, max_tokens=room, temperature=self._temperature, key=(len(self.turns) - 1) << 32 | self._seed
        )
        return _Answering(contender, voice, len(tokens), steps, cut_by_context=room < self._max_tokens)

    def _take_turns(self, answering: list[_Answering]) -> Iterator[Event]:
        """A step each, in turn, until all are over."""
        while answering:
            for one in list(answering):
                if not self._stopping and (more := one.go_on()):
                    yield Piece(one.contender, more)
                if self._stopping or one.over:
                    answering.remove(one)
                    yield one.close()

    def _keep(self, prompt: str, answer: Answer) -> None:
        if answer.text or answer.stop != "stopped":
            said = [Message(role="user", content=prompt), Message(role="assistant", content=answer.text)]
            self._histories[answer.contender] += said


class _Answering:
    """An answer under way."""

    def __init__(
        self,
        contender: Contender,
        voice: Voice,
        prompt_tokens: int,
        steps: Generator[Step, None, None],
        *,
        cut_by_context: bool,
    ) -> None:
        self.contender = contender
        self._voice, self._steps = voice, steps
        self._prompt_tokens = prompt_tokens
        self._cut_by_context = cut_by_context
        self._last: Step | None = None
        self._seconds = 0.0

    @property
    def over(self) -> bool:
        return self._last is not None and self._last.stop is not None

    def go_on(self) -> str:
        """Take a step. Returns what the text goes on with."""
        started = time.perf_counter()
        before = self._last.text if self._last else ""
        self._last = next(self._steps)
        self._seconds += time.perf_counter() - started
        return self._last.text[len(before) :] if self._last.text.startswith(before) else ""

    def close(self) -> Answer:
        """End it where it is."""
        self._steps.close()
        stop: Ending = (self._last.stop if self._last else None) or "stopped"
        return Answer(
            contender=self.contender,
            text=self._last.text if self._last else "",
            tokens=self._last.tokens if self._last else 0,
            seconds=self._seconds,
            stop="context" if stop == "length" and self._cut_by_context else stop,
            prompt_tokens=self._prompt_tokens,
            # Known once it has begun to read.
            remembered_tokens=self._voice.remembered if self._last else 0,
        )
