"""Answers of a local model, many at once, with mlx-lm's continuous batching.

Greedy, or drawn with a key of each answer's own, so that the same model gives the same answers. A prompt is padded to
the longest of its batch, which changes sums in the last bits: another batch size may, rarely, tip an answer the other
way.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from jinja2.exceptions import TemplateError
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.utils import load_tokenizer
from numpy.typing import NDArray

from mlx_distill.agreement import ProbeRow
from mlx_distill.backends.mlx import device
from mlx_distill.backends.mlx.distill import divergence_of
from mlx_distill.backends.mlx.drawing import Sampling
from mlx_distill.backends.mlx.head import Head, find_head
from mlx_distill.backends.mlx.loading import load_adapter, load_frozen
from mlx_distill.backends.mlx.observing import logits_at
from mlx_distill.batches import TeacherBuckets
from mlx_distill.distillation import Objective
from mlx_distill.errors import InputError
from mlx_distill.models.folder import context_length
from mlx_distill.models.tokenizer import require_chat_template
from mlx_distill.progress import Bar
from mlx_distill.records import Message, StopReason
from mlx_distill.rows import as_template_message

#: How many of the last tokens a repetition penalty looks back on.
PENALISED_TOKENS = 64

#: What a divergence that is told, and not learned from, is.
_FORWARD = Objective("forward-kl")


@dataclass(frozen=True)
class Answer:
    """What a model said.

    Attributes:
        index: Of the conversation answered.
        stop: "end" if the model ended by itself, "length" if the budget cut it.
        tokens: Written, the end mark not counted.
        seconds: From the start of the whole batch to the end of this answer.
    """

    index: int
    text: str
    stop: StopReason
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Reading:
    """What a model makes of a row's tokens, each a sum over its positions, in nats.

    Attributes:
        nll: Negative log-likelihood.
        divergence: KL(teacher‖model) over the teacher's buckets; None without a teacher. Infinite where it names a
            word that the model does not have.
    """

    nll: float
    divergence: float | None


class ChatModel:
    """A local model with its tokenizer: reads conversations as tokens, and tokens as answers.

    MLX binds what it computes to a thread: load a model in the thread that will use it.

    Args:
        folder: A model in Hugging Face layout.

    Attributes:
        context: How many tokens it sees at once; None where its files do not say.

    Raises:
        ModelError: It does not load, or has no chat template.
    """

    def __init__(self, folder: Path) -> None:
        device.prepare_memory()
        self._model, config = load_frozen(folder, dtype="auto")
        self._model.eval()
        # A model may have more end marks than its tokenizer names: Llama 3 has three.
        self._tokenizer = load_tokenizer(folder, eos_token_ids=config.get("eos_token_id"))
        require_chat_template(self._tokenizer, str(folder))
        self.context = context_length(folder)

    def adapted(self, adapter: Path) -> ChatModel:
        """The same model with an adapter on it. The two share their weights: together they take the memory of one.

        Args:
            adapter: Folder with `adapters.safetensors` and `adapter_config.json`.

        Raises:
            ModelError: The adapter is damaged, or was made for another model.
        """
        twin = copy.copy(self)
        # A copy of the modules alone: MLX's arrays are values, and a copy of one is the same memory.
        twin._model = copy.deepcopy(self._model)
        load_adapter(twin._model, adapter)
        twin._model.eval()
        mx.eval(twin._model.parameters())
        return twin

    @property
    def module(self) -> nn.Module:
        """The model itself, of mlx-lm."""
        return self._model

    @property
    def end_tokens(self) -> frozenset[int]:
        """The tokens that end an answer."""
        return frozenset(self._tokenizer.eos_token_ids)

    def empty_cache(self) -> list[Any]:
        """mlx-lm's cache of what the model has read, one entry a layer, empty."""
        return list(make_prompt_cache(self._model))

    def read(self, tokens: Sequence[int], cache: list[Any]) -> mx.array:
        """Read tokens after those in the cache, which takes them up. Computed when it is evaluated.

        Returns:
            Logits of what follows each: (tokens, vocabulary).
        """
        return self._model(mx.array([list(tokens)]), cache=cache)[0]

    def encode(self, conversation: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, up to where the answer begins.

        Raises:
            InputError: The model's chat template refuses it.
        """
        messages = [as_template_message(m) for m in conversation]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise InputError(
                f"the model's chat template refuses it: {error}.",
                hint="Some models know no system prompt, or want user and assistant to take turns.",
            ) from None
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def batches(self, *, batch_size: int, prefill_batch_size: int, repetition_penalty: float = 1.0) -> BatchGenerator:
        """mlx-lm's continuous batching over this model, greedy, ended by the model's own end marks.

        Args:
            batch_size: Answers written at once.
            prefill_batch_size: Prompts read at once, each padded to the longest of them.
            repetition_penalty: Of the last `PENALISED_TOKENS` words; 1 is off.
        """
        processors = None
        if repetition_penalty != 1.0:
            processors = make_logits_processors(
                repetition_penalty=repetition_penalty, repetition_context_size=PENALISED_TOKENS
            )
        return BatchGenerator(
            self._model,
            stop_tokens=[[token] for token in self._tokenizer.eos_token_ids],
            completion_batch_size=batch_size,
            prefill_batch_size=prefill_batch_size,
            logits_processors=processors,
        )


class Generator:
    """A local model that answers conversations.

    Args:
        folder: A model in Hugging Face layout.

    Raises:
        ModelError: It does not load, or has no chat template.
    """

    def __init__(self, folder: Path) -> None:
        self._model = ChatModel(folder)
        self.device = device.describe_device()

    def answer(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_tokens: int,
        batch_size: int,
        repetition_penalty: float = 1.0,
        names: Sequence[str] | None = None,
        sampling: Sequence[Sampling | None] | None = None,
        bar: Bar | None = None,
    ) -> Iterator[Answer]:
        """Answer every conversation, in the order in which the answers end.

        Args:
            conversations: Each ends with what is to be answered.
            max_tokens: Budget of an answer.
            batch_size: Conversations answered at once.
            repetition_penalty: See `ChatModel.batches`.
            names: What to call them in an error.
            sampling: How each answer is drawn; None is greedy.
            bar: Advanced by the tokens written.

        Raises:
            InputError: A conversation leaves no room for an answer in the model's context.
        """
        prompts = [self._model.encode(c) for c in conversations]
        for at, prompt in enumerate(prompts):
            if self._model.context is not None and len(prompt) + max_tokens > self._model.context:
                name = names[at] if names else f"conversation {at + 1}"
                raise InputError(
                    f"{name}: {len(prompt)} tokens of prompt and {max_tokens} of answer do not fit into the model's "
                    f"context of {self._model.context}.",
                    hint="Shorten the prompt, or lower --max-tokens.",
                )
        generator = self._model.batches(
            batch_size=batch_size, prefill_batch_size=batch_size, repetition_penalty=repetition_penalty
        )
        return self._generate(generator, prompts, max_tokens, sampling or [None] * len(prompts), bar or Bar())

    def read(self, row: ProbeRow, teacher: TeacherBuckets | None = None) -> Reading:
        """Read a row, and say how likely the model finds the tokens that follow its positions.

        Args:
            teacher: What a teacher says there, whose divergence from the model is then told.
        """
        total, apart, at = 0.0, 0.0, 0
        for logits in logits_at(self._model.module, self._parts, row):
            here = slice(at, at + logits.shape[0])
            targets = mx.array(row.targets[here])
            found = mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
            total += float((mx.logsumexp(logits, axis=-1) - found).sum().item())
            if teacher is not None:
                apart += _divergence(logits, teacher.ids[here], teacher.log_probs[here])
            at = here.stop
        mx.clear_cache()
        return Reading(total, None if teacher is None else apart)

    @cached_property
    def _parts(self) -> tuple[Callable[[mx.array], mx.array], Head] | None:
        return find_head(self._model.module)

    def _generate(
        self,
        generator: BatchGenerator,
        prompts: list[list[int]],
        max_tokens: int,
        sampling: Sequence[Sampling | None],
        bar: Bar,
    ) -> Iterator[Answer]:
        started = time.perf_counter()
        try:
            # Longest first: prompts of like length are padded least, and the last to start is the quickest to read.
            order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
            drawing = [None if (how := sampling[i]) is None else how.sampler() for i in order]
            samplers = {"samplers": drawing} if any(drawing) else {}
            uids = generator.insert([prompts[i] for i in order], [max_tokens] * len(order), **samplers)
            index_of = dict(zip(uids, order, strict=True))
            written: dict[int, list[int]] = {uid: [] for uid in uids}
            while responses := generator.next_generated():
                for response in responses:
                    if response.finish_reason != "stop":
                        written[response.uid].append(response.token)
                        bar.advance()
                    if response.finish_reason is not None:
                        tokens = written.pop(response.uid)
                        yield Answer(
                            index=index_of[response.uid],
                            text=self._model.decode(tokens),
                            stop="end" if response.finish_reason == "stop" else "length",
                            tokens=len(tokens),
                            seconds=time.perf_counter() - started,
                        )
        finally:
            generator.close()
            mx.clear_cache()


def _divergence(logits: mx.array, ids: NDArray[np.int32], log_probs: NDArray[np.float32]) -> float:
    if int(ids.max()) >= logits.shape[1]:
        return math.inf
    return float(divergence_of(logits, (mx.array(ids), mx.array(log_probs)), _FORWARD).item())
