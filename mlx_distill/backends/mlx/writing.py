"""Answers of a model in memory, all at once with mlx-lm's batches, and what writing them takes of the memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import closing

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import BatchGenerator

from mlx_distill.backends.mlx.drawing import Sampling

#: Tokens of a prompt read at once where only the cache is of interest that they leave behind.
_FEW = 32


def write(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sequence[Sampling | None],
    *,
    ends: Collection[int],
    max_tokens: int,
) -> list[list[int]]:
    """Write an answer to each prompt, all at once. Dropout is off.

    Args:
        prompts: Tokens.
        sampling: How each answer is drawn; None is greedy.
        ends: Tokens that end an answer.
        max_tokens: Of an answer.

    Returns:
        Tokens of each answer, with the one that ended it; without one where the budget cut it.
    """
    model.eval()
    samplers = [None if how is None else how.sampler() for how in sampling]
    with closing(_generator(model, len(prompts), ends)) as generator:
        asked = [list(prompt) for prompt in prompts]
        uids = generator.insert(asked, [max_tokens] * len(asked), **({"samplers": samplers} if any(samplers) else {}))
        written: dict[int, list[int]] = {uid: [] for uid in uids}
        while drawn := _next(generator):
            for uid, token in drawn:
                written[uid].append(token)
    mx.clear_cache()
    return [written[uid] for uid in uids]


def measure(model: nn.Module, rows: int, prompt: int, answer: int) -> int:
    """See `backends.base.Student.measure_writing`.

    There are two moments: the prompts are read, and the last words are written, when the cache is at its fullest. A
    cache is the same however it was filled, so that for the second a prompt as long as all takes the place of prompt
    and answer, and is read in small parts.
    """
    model.eval()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    reading = _peak(model, rows, prompt) - before
    fullest = _peak(model, rows, max(1, prompt + answer - 2), read_at_once=_FEW) - before
    mx.clear_cache()
    return int(max(reading, fullest))


def _peak(model: nn.Module, rows: int, prompt: int, *, read_at_once: int | None = None) -> int:
    """Most memory held while prompts are read and two words written; of the words alone where prompts come in parts."""
    asked = [[token % 8 for token in range(prompt)]] * rows
    with closing(_generator(model, rows, (), read_at_once=read_at_once)) as generator:
        generator.insert(asked, [3] * rows, samplers=[Sampling(1.0, row).sampler() for row in range(rows)])
        _next(generator)
        if read_at_once is not None:
            mx.synchronize(generator.stream)
            mx.reset_peak_memory()
        _next(generator)
        mx.synchronize(generator.stream)
        return int(mx.get_peak_memory())


def _generator(
    model: nn.Module, rows: int, ends: Collection[int], *, read_at_once: int | None = None
) -> BatchGenerator:
    parts = {} if read_at_once is None else {"prefill_step_size": read_at_once}
    return BatchGenerator(
        model,
        stop_tokens=[[token] for token in sorted(ends)],
        completion_batch_size=rows,
        prefill_batch_size=rows,
        **parts,
    )


def _next(generator: BatchGenerator) -> list[tuple[int, int]]:
    """The next token of each answer under way, by its number; of none at the end.

    What mlx-lm hands out holds on to the cache as it is when an answer ends; kept until the next step, it would be
    there twice.
    """
    return [(found.uid, int(found.token)) for found in generator.next_generated()]
