"""A local model that answers requests as they come and go, with mlx-lm's continuous batching.

A request joins those under way at the next token, and leaves the moment its answer is whole or it is taken back.
Where more wait than fit, they are taken in slices of like length, so that little is padded, and the slice of the
one that has waited longest comes first, so that none waits for ever. Greedy, or drawn with a key of each answer's own;
`generation.py` says what that means.

An engine lives in one thread, as MLX does: make it, use it and close it there. It does not divide a long prompt's
reading to keep the others writing beyond what mlx-lm does (2,048 tokens at a time), nor share common prefixes.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from mlx_distill.backends.mlx.drawing import Sampling
from mlx_distill.backends.mlx.generation import ChatModel
from mlx_distill.errors import InputError
from mlx_distill.records import Message, StopReason

#: Prompts read together. More would wait for the longest of them before any of them is answered.
PREFILL_BATCH = 8


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        stop: "end" if the model ended by itself, "length" if its budget cut it, "context" if its context did.
        prompt_tokens: Read.
        tokens: Written, the end mark not counted.
    """

    text: str
    stop: StopReason
    prompt_tokens: int
    tokens: int


@dataclass(eq=False)
class _Job:
    key: int
    prompt: list[int]
    budget: int
    cut: StopReason
    sampling: Sampling | None
    written: list[int] = field(default_factory=list)


class Engine:
    """Answers what is added to it.

    Args:
        folder: A model in Hugging Face layout.
        batch_size: Answers written at once; the others wait.

    Raises:
        ModelError: It does not load, or has no chat template.
    """

    def __init__(self, folder: Path, *, batch_size: int) -> None:
        self._model = ChatModel(folder)
        self._batch_size = batch_size
        self._generator = self._model.batches(batch_size=batch_size, prefill_batch_size=min(PREFILL_BATCH, batch_size))
        #: In the order in which they came.
        self._waiting: list[_Job] = []
        #: By mlx-lm's number of the sequence.
        self._active: dict[int, _Job] = {}

    def add(
        self, key: int, conversation: Sequence[Message], *, max_tokens: int, sampling: Sampling | None = None
    ) -> None:
        """Take a request.

        Args:
            key: What its completion is handed back under.
            conversation: Ends with what is to be answered.
            max_tokens: Budget of the answer. Where the model's context has less room, that is the budget.
            sampling: How the answer is drawn; None is greedy.

        Raises:
            InputError: The chat template refuses the conversation, or it fills the context alone.
        """
        prompt = self._model.encode(conversation)
        room = max_tokens if self._model.context is None else self._model.context - len(prompt)
        if room < 1:
            raise InputError(
                f"{len(prompt)} tokens of prompt leave no room in the model's context of {self._model.context}.",
                hint="Shorten the prompt.",
            )
        cut: StopReason = "length" if max_tokens <= room else "context"
        self._waiting.append(_Job(key, prompt, min(max_tokens, room), cut, sampling))

    def remove(self, keys: Iterable[int]) -> None:
        """Take requests back; those that are answered already are passed over."""
        gone = set(keys)
        self._waiting = [job for job in self._waiting if job.key not in gone]
        if numbers := [number for number, job in self._active.items() if job.key in gone]:
            self._generator.remove(numbers)
            for number in numbers:
                del self._active[number]

    def advance(self, seconds: float) -> list[tuple[int, Completion]]:
        """Write until an answer is whole, time is up, or nothing is left to do; at least one token of each.

        Returns:
            Key and completion of what became whole.
        """
        end = time.monotonic() + seconds
        whole: list[tuple[int, Completion]] = []
        while not whole and (self._active or self._waiting):
            self._admit()
            _, responses = self._generator.next()
            for response in responses:
                job = self._active[response.uid]
                # The end mark is no part of the answer. One that comes as the budget's last token ends it too.
                if response.finish_reason != "stop":
                    job.written.append(response.token)
                if response.finish_reason is not None:
                    del self._active[response.uid]
                    whole.append((job.key, self._completion(job, ended=response.finish_reason == "stop")))
            if time.monotonic() >= end:
                break
        if not self._active and not self._waiting:
            mx.clear_cache()
        return whole

    def close(self) -> None:
        """Let go of the model and of what MLX keeps for reuse."""
        self._waiting.clear()
        self._active.clear()
        self._generator.close()
        del self._generator, self._model
        mx.clear_cache()

    def _admit(self) -> None:
        while self._waiting and len(self._active) < self._batch_size:
            jobs = self._next_slice(min(PREFILL_BATCH, self._batch_size - len(self._active)))
            numbers = self._generator.insert(
                [job.prompt for job in jobs],
                [job.budget for job in jobs],
                # mlx-lm's own, which is greedy, in the place of None.
                samplers=[None if job.sampling is None else job.sampling.sampler() for job in jobs],
            )
            self._active.update(zip(numbers, jobs, strict=True))

    def _next_slice(self, size: int) -> list[_Job]:
        """Take out the slice of `size`, of all that wait by length, that holds the one that came first."""
        by_length = sorted(self._waiting, key=lambda job: -len(job.prompt))
        start = by_length.index(self._waiting[0]) // size * size
        jobs = by_length[start : start + size]
        self._waiting = [job for job in self._waiting if job not in jobs]
        return jobs

    def _completion(self, job: _Job, *, ended: bool) -> Completion:
        return Completion(
            text=self._model.decode(job.written),
            stop="end" if ended else job.cut,
            prompt_tokens=len(job.prompt),
            tokens=len(job.written),
        )
