"""A local model that talks: token by token, remembering what it has read from one turn to the next.

Of two voices that share their weights (see `ChatModel.adapted`), each has its own memory. Nothing runs ahead: when a
step is done, what the voice remembers is exactly what was read and written, so it can be left after any of them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from mlx_distill.backends.mlx import device
from mlx_distill.backends.mlx.generation import ChatModel
from mlx_distill.records import Message

#: Tokens of a prompt that are read in one step: few enough that a step is short.
_CHUNK = 512

#: What stands for the first bytes of a character that is not whole yet.
_INCOMPLETE = "�"


@dataclass(frozen=True)
class Step:
    """How far an answer is.

    Attributes:
        text: All of it that is sure not to change; empty while the prompt is being read.
        tokens: Written, the end mark not counted.
        stop: "end" if the model has ended by itself, "length" if the budget is spent; None while it goes on.
    """

    text: str
    tokens: int
    stop: Literal["end", "length"] | None = None


class Voice:
    """A model in a conversation. To be used in the thread that loaded it.

    Args:
        model: What speaks.

    Attributes:
        context: How many tokens it sees at once; None where its files do not say.
        remembered: Tokens of the last prompt that it had read before, and did not read again.
    """

    def __init__(self, model: ChatModel) -> None:
        self._model = model
        self.context = model.context
        self.remembered = 0
        self.forget()

    def forget(self) -> None:
        """Let go of all that was read."""
        self._cache: list[Any] = []
        self._read: list[int] = []

    def encode(self, conversation: Sequence[Message]) -> list[int]:
        """See `ChatModel.encode`."""
        return self._model.encode(conversation)

    def answer(
        self, prompt: Sequence[int], *, max_tokens: int, temperature: float, key: int
    ) -> Generator[Step, None, None]:
        """Answer a conversation, a step at a time; the last one says why it is the last.

        Only what differs from all that was read and written before is read.

        Args:
            prompt: Its tokens, at least one.
            max_tokens: Budget of the answer, above 0.
            temperature: 0 is greedy.
            key: Decides what is drawn; 64 bits.

        Raises:
            ResourceError: The machine is out of memory. Nothing is remembered.
        """
        *before, token = self._rewind(prompt)
        try:
            for start in range(0, len(before), _CHUNK):
                with self._reading(before[start : start + _CHUNK]):
                    # Only what the cache is to hold: the logits, of which there are many, are never computed.
                    pass
                yield Step("", 0)
            yield from self._write(token, max_tokens, temperature, mx.random.key(key))
        finally:
            mx.clear_cache()

    def _write(self, token: int, max_tokens: int, temperature: float, state: mx.array) -> Generator[Step, None, None]:
        written: list[int] = []
        settled = ""
        while True:
            state, draw = mx.random.split(state)
            token = self._next(token, temperature, draw)
            if token in self._model.end_tokens:
                yield Step(self._model.decode(written), len(written), "end")
                return
            written.append(token)
            # The whole again each time, as tokenizers let neighbours change each other: a tenth of a millisecond.
            text = self._model.decode(written)
            if len(written) == max_tokens:
                yield Step(text, len(written), "length")
                return
            settled = max(settled, text.rstrip(_INCOMPLETE), key=len)
            yield Step(settled, len(written))

    def _rewind(self, prompt: Sequence[int]) -> list[int]:
        """Forget what is no beginning of the prompt. Returns what is left to read: at least its last token."""
        shared = 0
        for ours, theirs in zip(self._read, prompt[:-1], strict=False):
            if ours != theirs:
                break
            shared += 1
        surplus = len(self._read) - shared
        # Some caches cannot go back: those of sliding windows, and of recurrent models.
        if surplus and can_trim_prompt_cache(self._cache) and trim_prompt_cache(self._cache, surplus) == surplus:
            del self._read[shared:]
        elif surplus:
            self.forget()
        if not self._cache:
            self._cache = self._model.empty_cache()
        self.remembered = len(self._read)
        return list(prompt[self.remembered :])

    def _next(self, token: int, temperature: float, draw: mx.array) -> int:
        """Read a token, and choose the one that follows."""
        with self._reading([token]) as logits:
            # As mlx-lm normalises before it chooses: in half precision that can make two tokens equal.
            scores = logits[-1] - mx.logsumexp(logits[-1], keepdims=True)
            chosen = mx.argmax(scores) if temperature == 0 else mx.random.categorical(scores / temperature, key=draw)
            return int(chosen.item())

    @contextmanager
    def _reading(self, tokens: list[int]) -> Iterator[mx.array]:
        """Read tokens, and remember them once what is done with their logits is done."""
        try:
            with device.explained_allocation("/reset forgets the conversation; a shorter one takes less."):
                yield self._model.read(tokens, self._cache)
                mx.eval([layer.state for layer in self._cache])
        except BaseException:
            # Some layers may have it and others not.
            self.forget()
            raise
        self._read += tokens


def open_voices(base: Path, adapter: Path) -> tuple[Voice, Voice]:
    """The base model and the student that an adapter makes of it, in the memory of one model.

    Args:
        base: Folder of the model that the adapter was trained on.
        adapter: Folder with `adapters.safetensors` and `adapter_config.json`.

    Raises:
        ModelError: One does not load, or the model has no chat template.
    """
    model = ChatModel(base)
    return Voice(model), Voice(model.adapted(adapter))
