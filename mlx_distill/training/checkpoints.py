"""Checkpoints from which a run goes on as if it had never stopped.

A checkpoint is one safetensors file: the backend's state as tensors, the files of the best adapter so far as bytes, the
loop's cursor as JSON in the metadata, and a hash over all. It is written whole or not at all, and one that does not
match its hash is skipped. What was saved and is lost is never passed over in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as as_safetensors

from mlx_distill import layout
from mlx_distill.backends.base import NO_TOKENS, State, StepStats
from mlx_distill.errors import TrainingError
from mlx_distill.progress import Progress
from mlx_distill.records import Record
from mlx_distill.run_records import MetricRow

_PREFIX = "step-"

#: Group of the files of the best adapter among the arrays.
_KEPT = "kept"

#: Bytes of a file that are read at once.
_CHUNK = 1 << 24

_ANEW = (
    "Its adapter and metrics are as they were. Choose another --run folder; or, to start anew in this one and "
    "overwrite them, remove its checkpoints and metrics.jsonl."
)


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
        lowest_loss: Lowest mean of what is minimised, of the first step, the first validation and the windows so far.
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
        # Not by `save_file`, which writes a file of its own beside it first: a kill would leave that for good.
        temporary.write_bytes(as_safetensors(arrays, metadata))
    found = _all(folder)
    kept = [path for path in found if path <= written][:keep]
    for path in set(found) - set(kept):
        path.unlink(missing_ok=True)


def newest(folder: Path, progress: Progress) -> tuple[Cursor, State] | None:
    """The newest checkpoint that is whole; damaged ones are skipped with a message. None where none was saved.

    Raises:
        TrainingError: None is whole, or one that may be whole cannot be read.
    """
    paths: list[Path] = []
    with _readable(folder):
        paths = _all(folder)
    for path in paths:
        with _readable(path):
            _read_through(path)
        try:
            return _read(path)
        except (SafetensorError, ValidationError, ValueError, KeyError, OSError) as error:
            progress.say(f"{path} is damaged ({error}).")
    if paths:
        raise TrainingError(f"All checkpoints in {folder} are damaged: nothing is left to go on from.", hint=_ANEW)
    return None


def require_none_needed(folder: layout.RunFolder, first_due: int, *, finish: bool) -> None:
    """Refuse to start over where the metrics say that a checkpoint had been saved; for a folder that has none.

    Args:
        folder: Of the run.
        first_due: Steps after which the first one is saved.
        finish: Whether the run is to be finished, and not begun.

    Raises:
        TrainingError: One had been saved, or one is to be finished with.
    """
    rows = layout.read_rows(folder.metrics, MetricRow)
    last = max((row.step for row in rows), default=0)
    # A test comes after the last step, and that is saved.
    if last > first_due or any(row.kind == "test" for row in rows):
        raise TrainingError(
            f"{folder.root} has metrics of {last} steps, but no checkpoint is left to go on from.", hint=_ANEW
        )
    if finish:
        raise TrainingError(
            f"{folder.root} has no checkpoint: there is nothing yet to finish with.",
            hint="Leave --finish out, to train.",
        )


def with_adapter(state: State, folder: layout.RunFolder) -> State:
    """A state together with the best adapter so far, whatever becomes of its files later.

    Raises:
        TrainingError: They cannot be read any more.
    """
    try:
        kept = {f"{_KEPT}.{path.name}": np.frombuffer(path.read_bytes(), np.uint8) for path in _adapter_files(folder)}
    except OSError as error:
        raise TrainingError(
            f"{error.filename}, of the best adapter so far, cannot be read any more: {error.strerror}.",
            hint="The same command goes on from the last checkpoint, which has it.",
        ) from None
    return State({**state.arrays, **kept})


def put_back_adapter(state: State, folder: layout.RunFolder) -> State:
    """Bring the files of the best adapter back to what they were when a checkpoint was saved.

    Returns:
        The rest of the state, which is the student's.

    Raises:
        TrainingError: The adapter is gone, and the checkpoint is of a version that did not keep it.
        ResourceError: It cannot be written.
    """
    kept = state.group(_KEPT)
    for path in _adapter_files(folder):
        content = kept[path.name].tobytes() if path.name in kept else None
        if content is not None and not _holds(path, content):
            with layout.atomic_file(path) as temporary:
                temporary.write_bytes(content)
    if not folder.adapter.is_file():
        raise TrainingError(
            f"{folder.adapter}, the best adapter, is gone, and the checkpoint does not hold it.",
            hint="Choose another --run folder; or, to start anew, remove its checkpoints and metrics.jsonl.",
        )
    return State({name: value for name, value in state.arrays.items() if not name.startswith(f"{_KEPT}.")})


def _adapter_files(folder: layout.RunFolder) -> tuple[Path, Path]:
    return folder.adapter, folder.adapter_config


def _holds(path: Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """While open, a file that the system does not let us read is no damaged one: what is in it may be whole.

    Raises:
        TrainingError: It cannot be read.
    """
    try:
        yield
    except FileNotFoundError:
        pass
    except OSError as error:
        raise TrainingError(
            f"{path} cannot be read: {error.strerror or error}.",
            hint="Nothing was changed. Make it readable (its owner, its rights, its disk): the same command goes on.",
        ) from None


def _read_through(path: Path) -> None:
    """Raise what the system says: safetensors calls all that it cannot open missing, and dies of a bad disk."""
    with path.open("rb") as file:
        while file.read(_CHUNK):
            pass


def _read(path: Path) -> tuple[Cursor, State]:
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    text = metadata["cursor"]
    if metadata["sha256"] != _digest(text, arrays):
        raise ValueError("its content does not match its hash")
    return Cursor.model_validate_json(text), State(arrays)


def _all(folder: Path) -> list[Path]:
    """The newest first. Not by `glob`, to which a folder that cannot be read is an empty one."""
    return sorted((path for path in folder.iterdir() if path.match(f"{_PREFIX}*.safetensors")), reverse=True)


def _digest(text: str, arrays: Mapping[str, NDArray[np.generic]]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        value = arrays[name]
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
