"""A teacher on MLX that is asked for its distribution: its likeliest words at each position that carries loss."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_distill.backends.mlx import device
from mlx_distill.backends.mlx.head import CHUNK, find_head
from mlx_distill.backends.mlx.loading import load_frozen
from mlx_distill.batches import Batch, TeacherBuckets


class LogitTeacher:
    """A frozen model.

    Args:
        folder: In Hugging Face layout; dense or quantized.
        dtype: Of its weights, as in training.

    Attributes:
        words: Of its vocabulary: columns of its logits.
        dtype: That it computes in.

    Raises:
        ModelError: It does not load.
    """

    def __init__(self, folder: Path, *, dtype: str) -> None:
        device.prepare_memory()
        self._model, _ = load_frozen(folder, dtype=dtype)
        self._model.eval()
        self._parts = find_head(self._model)
        probe = self._model(mx.array([[0, 1]]))
        self.words = int(probe.shape[-1])
        self.dtype = str(probe.dtype).removeprefix("mlx.core.")
        self.device = device.describe_device()

    def likeliest(self, batch: Batch, top_k: int) -> TeacherBuckets:
        """What it says at the positions of a batch that carry loss, row by row.

        Args:
            top_k: Words named, at most `words`.
        """
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
            named, found = _likeliest(logits, top_k)
            mx.eval(named, found)
            ids.append(np.array(named))
            logs.append(np.array(found))
        mx.clear_cache()
        return TeacherBuckets(np.concatenate(ids), np.concatenate(logs))


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
