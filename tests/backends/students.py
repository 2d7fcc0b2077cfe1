"""Students with adapters, and what is asked of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import load_model, quantize_model, save_model
from numpy.typing import NDArray

from mlx_distill.backends.base import NO_TOKENS, StepStats
from mlx_distill.backends.mlx.student import MlxStudent
from mlx_distill.batches import TokenRow, in_order, make_batch
from tests.training.runs import settings


def student(model: Path, **changes: Any) -> MlxStudent:
    return MlxStudent(model, settings(Path("data"), model, Path("run"), **changes))


def random_rows(lengths: Sequence[int], *, seed: int, share: float) -> list[TokenRow]:
    """Rows of these lengths, of which about this share carries loss."""
    generator = np.random.default_rng(seed)
    made = []
    for length in lengths:
        mask = generator.random(length) < share
        mask[0], mask[-1] = False, True
        made.append(TokenRow(generator.integers(1, 380, length).astype(np.int32), mask))
    return made


def rows() -> list[TokenRow]:
    """Rows of unlike length; some have one target, some nearly all of theirs."""
    generator = np.random.default_rng(11)
    made = []
    for at, length in enumerate((4, 37, 16, 50, 9, 23, 40, 31)):
        mask = generator.random(length) < (0.9 if at % 2 else 0.0)
        mask[0], mask[-1] = False, True
        made.append(TokenRow(generator.integers(1, 380, length).astype(np.int32), mask))
    return made


ROWS = rows()
WHOLE = make_batch(ROWS, range(8))


def over(one: MlxStudent) -> StepStats:
    return sum((one.evaluate(batch) for batch in in_order(ROWS, 4)), NO_TOKENS)


def trained(model: Path, **changes: Any) -> MlxStudent:
    """A student whose adapter says something."""
    one = student(model, **changes)
    for _ in range(4):
        one.step([WHOLE], 2e-2)
    return one


def parameters(one: MlxStudent) -> dict[str, NDArray[Any]]:
    return {n.removeprefix("adapter."): v for n, v in one.state().arrays.items() if n.startswith("adapter.")}


def replace_model(folder: Path, model: nn.Module, description: dict[str, Any]) -> Path:
    """Put another model beside a folder's tokenizer."""
    (folder / "model.safetensors").unlink()
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(description), encoding="utf-8")
    return folder


def quantize(folder: Path, bits: int, *, group_size: int = 32) -> Path:
    model, description = load_model(folder)
    model, description = quantize_model(model, description, group_size=group_size, bits=bits)
    save_model(folder, model, donate_model=True)
    (folder / "config.json").write_text(json.dumps(description), encoding="utf-8")
    return folder


def mean_loss(model: nn.Module) -> float:
    """Of mlx-lm's model, from whole logits."""
    total, targets = 0.0, 0
    for row in ROWS:
        places = np.flatnonzero(row.loss_mask)
        logits = np.array(model(mx.array(row.tokens[None])).astype(mx.float32))[0].astype(np.float64)
        wide = logits[places - 1]
        top = wide.max(axis=-1)
        log_sum = top + np.log(np.exp(wide - top[:, None]).sum(axis=-1))
        total += float((log_sum - wide[np.arange(len(places)), row.tokens[places]]).sum())
        targets += len(places)
    return total / targets
