"""A teacher on MLX that is asked for its distribution: its likeliest words at each position that carries loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_distill.backends.mlx import device
from mlx_distill.backends.mlx.head import CHUNK, find_head
from mlx_distill.backends.mlx.loading import load_frozen
from mlx_distill.batches import Batch, TeacherBuckets, padded_width
from mlx_distill.errors import ModelError

#: Positions whose words are sorted at once: that takes three times the logits.
_SORTED = 64

_READING_ADVICE = (
    "What was written stands; the same command goes on. With --batch-size 1 it reads row by row; a 4-bit teacher takes "
    "less."
)
_ADVICE = (
    "What was written stands. A 4-bit teacher takes less; so does one that is asked before training, with  "
    "mlx-distill logits, and is not in memory beside the student."
)


class LogitTeacher:
    """A frozen model.

    Args:
        folder: In Hugging Face layout; dense or quantized.
        dtype: Of its weights, as in training.
        known: Words of its tokenizer. Columns of its logits beyond them pad the vocabulary to a size that suits a
            machine, mean nothing, and are left out: another model of the family may have fewer or more of them.

    Attributes:
        words: That it tells apart: columns of its logits, those that pad left out.
        dtype: That it computes in.
        weights_bytes: Of its weights.

    Raises:
        ModelError: It does not load.
        ResourceError: There is not enough memory.
    """

    def __init__(self, folder: Path, *, dtype: str, known: int) -> None:
        device.prepare_memory()
        self._folder = folder
        with device.explained_allocation(_ADVICE):
            self._model, _ = load_frozen(folder, dtype=dtype)
            self._model.eval()
            self._parts = find_head(self._model)
            probe = self._model(mx.array([[0, 1]]))
        self.words = min(int(probe.shape[-1]), known)
        self.dtype = str(probe.dtype).removeprefix("mlx.core.")
        self.weights_bytes = sum(value.nbytes for _, value in tree_flatten(self._model.parameters()))
        self.device = device.describe_device()

    def likeliest(self, batch: Batch, top_k: int) -> TeacherBuckets:
        """What it says at the positions of a batch that carry loss, row by row.

        Args:
            top_k: Words named, at most `words`.

        Raises:
            ModelError: It computes what is no number.
            ResourceError: There is not enough memory.
        """
        with device.explained_allocation(_READING_ADVICE):
            found = self._read(batch, top_k)
        mx.clear_cache()
        return found

    def row_by_row(self, batch: Batch, places: Sequence[int], top_k: int) -> list[TeacherBuckets]:
        """The same of each of these rows of a batch, read alone and no wider than it is.

        So what it says of a row does not depend on the company that the row is in, to the bit, and it never takes more
        than one row does.
        """
        with device.explained_allocation(_ADVICE):
            found = [self._read(_alone(batch, at), top_k) for at in places]
        mx.clear_cache()
        return found

    def measure(self, width: int, top_k: int) -> int:
        """Bytes that reading one row of a width takes at its peak, beyond what is held before."""
        tokens = np.arange(width, dtype=np.int32)[None] % 8
        mask = np.arange(width)[None] > 0
        row = np.zeros(1, np.int32)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        with device.explained_allocation(_ADVICE):
            self._read(Batch(tokens, mask, row + width, row), top_k)
        taken = int(mx.get_peak_memory() - before)
        mx.clear_cache()
        return taken

    def _read(self, batch: Batch, top_k: int) -> TeacherBuckets:
        rows, columns = np.nonzero(batch.loss_mask)
        places = mx.array((rows * batch.tokens.shape[1] + columns - 1).astype(np.int32))
        tokens = mx.array(batch.tokens)
        top = self._model(tokens) if self._parts is None else self._parts[0](tokens)
        top = top.reshape(-1, top.shape[-1])[places]
        ids: list[np.ndarray] = []
        logs: list[np.ndarray] = []
        for at in range(0, len(rows), CHUNK):
            part = top[at : at + CHUNK]
            logits = part.astype(mx.float32) if self._parts is None else self._parts[1].logits(part)
            logits = logits[:, : self.words]
            for some in range(0, len(logits), _SORTED):
                named, found = _likeliest(logits[some : some + _SORTED], top_k)
                mx.eval(named, found)
                if mx.isnan(found).any().item():
                    raise ModelError(
                        f"{self._folder} computes what is no number, in {self.dtype}.",
                        hint="Try --dtype float32, or check the model with  mlx-distill doctor",
                    )
                ids.append(np.array(named))
                logs.append(np.array(found))
        return TeacherBuckets(np.concatenate(ids), np.concatenate(logs))


def _alone(batch: Batch, at: int) -> Batch:
    width = padded_width(int(batch.lengths[at]))
    one = slice(at, at + 1)
    return replace(
        batch,
        tokens=batch.tokens[one, :width],
        loss_mask=batch.loss_mask[one, :width],
        lengths=batch.lengths[one],
        rows=batch.rows[one],
        teacher=None,
    )


def _likeliest(logits: mx.array, top_k: int) -> tuple[mx.array, mx.array]:
    """Ids (n, K), ascending, and the logarithms of their probabilities, with that of all others as one more."""
    words = logits.shape[1]
    normaliser = mx.logsumexp(logits, axis=-1, keepdims=True)
    if top_k == words:
        return mx.broadcast_to(mx.arange(words, dtype=mx.int32), logits.shape), logits - normaliser
    ids = mx.sort(mx.argpartition(-logits, kth=top_k - 1, axis=-1)[:, :top_k].astype(mx.int32), axis=-1)
    others = mx.put_along_axis(logits, ids, mx.array(-mx.inf), axis=-1)
    rest = mx.logsumexp(others, axis=-1, keepdims=True)
    return ids, mx.concatenate([mx.take_along_axis(logits, ids, axis=-1), rest], axis=-1) - normaliser
