"""On-policy distillation: batches in which the student writes the answers, for the teacher to have its say on them.

A student that learns from texts that it would never write meets its own mistakes only when it is used. Here, in a share
of the batches, it answers the rows' prompts itself, sampled with a key of each answer's own, and learns the teacher's
distribution on what it wrote (Agarwal et al., "On-Policy Distillation of Language Models", 2024, arXiv:2306.13649). No
gradient goes through the sampling, as there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlx_distill.backends.base import Student
from mlx_distill.batches import Batch, TokenRow, make_batch, padded_width
from mlx_distill.config import TrainConfig

#: Tells these draws from others of the same seed.
_SALT = 0x6F776E


class OwnTimes(NamedTuple):
    """Seconds of a step on own answers, its training apart."""

    writing: float
    scoring: float


def is_own(config: TrainConfig, step: int) -> bool:
    """Whether the student writes the answers of a step, counted from 0."""
    return bool(np.random.default_rng([config.seed, _SALT, step]).random() < config.on_policy)


def own_batches(
    student: Student,
    rows: Sequence[TokenRow],
    indices: Sequence[int],
    config: TrainConfig,
    step: int,
    words: int,
    rows_at_once: Callable[[int, int], int],
    answers_at_once: Callable[[int, int], int],
) -> list[Batch]:
    """The rows' prompts with the student's answers, on which alone there is loss.

    Args:
        rows: Of the split.
        indices: Which of them.
        step: Decides the draws, together with the row.
        words: That student and teacher both know: no others are drawn.
        rows_at_once: Of how many rows of a width a batch may be.
        answers_at_once: How many answers are written at once, of how many, and of how many tokens with their prompts.
    """
    if not indices:
        return []
    prompts = [_prompt(rows[index]) for index in indices]
    keys = [_key(config.seed, step, index) for index in indices]
    longest = max(len(prompt) for prompt in prompts)
    some = answers_at_once(len(prompts), longest + config.on_policy_tokens)
    answers = [
        answer
        for start in range(0, len(prompts), some)
        for answer in student.write(
            prompts[start : start + some],
            keys[start : start + some],
            max_tokens=config.on_policy_tokens,
            temperature=config.on_policy_temperature,
            words=words,
        )
    ]
    made = [_row(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    size = rows_at_once(len(made), padded_width(max(len(row.tokens) for row in made)))
    batches = []
    for start in range(0, len(made), size):
        part = range(start, min(start + size, len(made)))
        batch = make_batch(made, part)
        batches.append(replace(batch, rows=np.array([indices[at] for at in part], np.int32), own=True))
    return batches


def longest_prompt(rows: Sequence[TokenRow]) -> int:
    """Tokens of the longest prompt that an answer is written to."""
    return max(len(_prompt(row)) for row in rows)


def _prompt(row: TokenRow) -> NDArray[np.int32]:
    """Up to where the first answer begins."""
    return row.tokens[: int(np.argmax(row.loss_mask))]


def _row(prompt: NDArray[np.int32], answer: NDArray[np.int32]) -> TokenRow:
    mask = np.zeros(len(prompt) + len(answer), np.bool_)
    mask[len(prompt) :] = True
    return TokenRow(np.concatenate([prompt, answer]), mask)


def _key(seed: int, step: int, row: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {step} {row}".encode()).digest()[:8], "big")
