"""What a model on MLX says to a probe: its logits at some positions, and its greedy answers.

Each row is read by itself, without padding, and the head computes the wanted positions alone where the model is a body
and a linear head. A base with its adapter and the model fused from them go the same way, so that what differs is not
how they were looked at.

Writes: FOLDER/{logits.npy,greedy.json}, where it is told to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_distill.agreement import ObservationWriter, Probe, ProbeRow
from mlx_distill.backends.mlx import device, writing
from mlx_distill.backends.mlx.head import Head, find_head
from mlx_distill.backends.mlx.loading import load_adapter, load_frozen

#: Positions whose logits exist at once. Of a vocabulary of 150,000, these take 40 MB.
_CHUNK = 64


def observe(model: nn.Module, probe: Probe, folder: Path) -> None:
    """Write what a model says.

    Args:
        model: Of mlx-lm, with or without an adapter.
        folder: Made where it is not there.

    Raises:
        OSError: It cannot be written, as on a full disk.
    """
    # No dropout: that of an adapter is on until it is told.
    model.eval()
    writer = ObservationWriter(folder, probe)
    parts = find_head(model)
    for row in probe.rows:
        for logits in logits_at(model, parts, row):
            mx.eval(logits)
            writer.add_row(np.asarray(logits))
    writer.finish(_answers(model, probe))
    mx.clear_cache()


def observe_folder(folder: Path, adapter: Path | None, probe: Probe, out: Path) -> None:
    """Load a model and write what it says; its memory is given back.

    Args:
        folder: A model in Hugging Face layout. On a CPU it computes in float32, whatever type its weights have.
        adapter: Folder of an adapter to put on it.
        out: Made where it is not there.

    Raises:
        ModelError: The model does not load, or the adapter does not fit it.
        ResourceError: There is not enough memory.
        OSError: It cannot be written, as on a full disk.
    """
    device.prepare_memory()
    with device.explained_allocation("Close other programs, or take a smaller model."):
        model, _ = load_frozen(folder, dtype="auto")
        if adapter is not None:
            load_adapter(model, adapter)
        observe(model, probe, out)
        del model
    mx.clear_cache()


def logits_at(
    model: nn.Module, parts: tuple[Callable[[mx.array], mx.array], Head] | None, row: ProbeRow
) -> Iterator[mx.array]:
    """What follows some positions of a row, in chunks.

    Args:
        parts: Of `head.find_head`; None where the head is not a linear one.

    Yields:
        Logits (some positions, vocabulary) in float32, in the order of the row's positions.
    """
    tokens, positions = mx.array([row.tokens]), mx.array(row.positions)
    whole = model(tokens)[0] if parts is None else parts[0](tokens)[0]
    for start in range(0, len(row.positions), _CHUNK):
        wanted = whole[positions[start : start + _CHUNK]]
        yield wanted.astype(mx.float32) if parts is None else parts[1].logits(wanted)


def _answers(model: nn.Module, probe: Probe) -> list[list[int]]:
    """Greedy answers to the prompts, all at once, in their order."""
    if not probe.prompts or not probe.greedy_tokens:
        return [[] for _ in probe.prompts]
    greedy = [None] * len(probe.prompts)
    written = writing.write(model, probe.prompts, greedy, ends=probe.end_tokens, max_tokens=probe.greedy_tokens)
    return [answer[:-1] if answer and answer[-1] in probe.end_tokens else answer for answer in written]
