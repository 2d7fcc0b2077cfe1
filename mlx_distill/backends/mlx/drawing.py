"""How the words of an answer are drawn: with a key of its own, so that no draw depends on what else is in a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Sampling:
    """How the words of one answer are drawn.

    Attributes:
        temperature: Above 0.
        key: Decides the draws: they do not depend on what else is in the batch.
        words: Tokens that may be drawn, the first so many; None: all that the model has a logit for, those that pad
            its vocabulary included.
    """

    temperature: float
    key: int
    words: int | None = None

    @classmethod
    def of(cls, temperature: float, *what: object) -> Sampling | None:
        """The sampling that is of something alone; None for a temperature of 0, which is greedy."""
        digest = hashlib.sha256("\n".join(map(str, what)).encode()).digest()
        return cls(temperature, int.from_bytes(digest[:8], "big")) if temperature else None

    def sampler(self) -> Callable[[mx.array], mx.array]:
        """Draws a token from log-probabilities (1, V), the next one at each call."""
        keys = [mx.random.key(self.key)]

        def draw(logprobs: mx.array) -> mx.array:
            keys[0], key = mx.random.split(keys[0])
            return mx.random.categorical(logprobs[..., : self.words] * (1 / self.temperature), key=key)

        return draw
