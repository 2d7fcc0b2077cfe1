"""Checkpoints from which a run goes on as if it had never stopped.

A checkpoint is one safetensors file: the backend's state as tensors, the loop's cursor as JSON in the metadata, and a
hash over both. It is written whole or not at all, and one that does not match its hash is skipped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mlx_distill import layout
from mlx_distill.backends.base import NO_TOKENS, State, StepStats
from mlx_distill.progress import Progress
from mlx_distill.records import Record

_PREFIX = "step-"


class Sums(Record):
    """What some steps add up to."""

    loss_sum: float = 0.0
    correct: int = 0
    target_tokens: int = 0
    tokens: int = 0
    divergence_sum: float | None = None

    @classmethod
    def of(cls, stats: StepStats) -> Sums:
        """The sums of some statistics."""
        return cls(
            loss_sum=stats.loss_sum,
            correct=stats.correct,
            target_tokens=stats.target_tokens,
            tokens=stats.tokens,
            divergence_sum=stats.divergence_sum,
        )

    def stats(self) -> StepStats:
        """The same as statistics."""
        return NO_TOKENS + StepStats(self.loss_sum, self.correct, self.target_tokens, self.tokens, self.divergence_sum)


class Cursor(Record):
    """Where the loop stands.

    Attributes:
        epoch: Whole epochs done.
        batch: Batches done in the epoch under way.
        step: Optimizer steps done.
        metric_rows: Rows that `metrics.jsonl` had.
        epoch_sums: Of the steps of the epoch under way, on the data's answers.
        own_sums: Of those on answers that the student wrote.
        window: Of the steps since training was last looked at for divergence.
        lowest_loss: Lowest mean loss of the first step, the first validation and the windows so far.
        best_score: Lowest of what is minimised over the validation rows so far, of the adapter at `best_step`.
        best_loss: Its cross-entropy, and `best_divergence` its divergence from the teacher.
        stale: Validations since then, all without a lower loss.
        validated_step: Step of the last validation.
        trained_tokens: Real tokens trained on so far.
        seconds: Time spent so far, all in all; `training_seconds` without evaluation.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    metric_rows: int = 0
    epoch_sums: Sums = Sums()
    own_sums: Sums = Sums()
    window: Sums = Sums()
    lowest_loss: float | None = None
    train_loss: float | None = None
    first_valid_loss: float | None = None
    first_divergence: float | None = None
    best_score: float | None = None
    best_loss: float | None = None
    best_divergence: float | None = None
    best_accuracy: float | None = None
    best_step: int | None = None
    stale: int = 0
    validated_step: int | None = None
    trained_tokens: int = 0
    training_seconds: float = 0.0
    seconds: float = 0.0


def save(folder: Path, cursor: Cursor, state: State, *, keep: int) -> None:
    """Write a checkpoint, then remove all but the newest `keep` up to it.

    Those of later steps are damaged ones that the run went back from: they must not count as the newest.

    Raises:
        ResourceError: The disk is full; the earlier checkpoints are untouched.
    """
    # Not `ascontiguousarray`, which gives a scalar a dimension.
    arrays = {name: np.asarray(value, order="C") for name, value in state.arrays.items()}
    text = cursor.to_json()
    metadata = {"cursor": text, "sha256": _digest(text, arrays)}
    written = folder / f"{_PREFIX}{cursor.step:08d}.safetensors"
    with layout.atomic_file(written) as temporary:
        _write(arrays, temporary, metadata)
    found = _all(folder)
    kept = [path for path in found if path <= written][:keep]
    for path in set(found) - set(kept):
        path.unlink(missing_ok=True)


def _write(arrays: dict[str, NDArray[np.generic]], path: Path, metadata: dict[str, str]) -> None:
    try:
        save_file(arrays, path, metadata=metadata)
    except SafetensorError as error:
        # safetensors has no other for a full disk.
        raise OSError(str(error)) from error


def newest(folder: Path, progress: Progress) -> tuple[Cursor, State] | None:
    """The newest checkpoint that is whole; damaged ones are skipped with a message."""
    for path in _all(folder):
        try:
            return _read(path)
        except (SafetensorError, ValidationError, ValueError, KeyError, OSError) as error:
            progress.say(f"{path} is damaged ({error}); trying the one before it.")
    return None


def _read(path: Path) -> tuple[Cursor, State]:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    text = metadata["cursor"]
    if metadata["sha256"] != _digest(text, arrays):
        raise ValueError("its content does not match its hash")
    return Cursor.model_validate_json(text), State(arrays)


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_PREFIX}*.safetensors"), reverse=True)


def _digest(text: str, arrays: Mapping[str, NDArray[np.generic]]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        value = arrays[name]
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
