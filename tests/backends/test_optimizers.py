"""The optimizers: each does what its paper says, decays matrices alone, follows the learning rate, and resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from numpy.typing import NDArray

from mlx_distill.backends.base import State
from mlx_distill.backends.mlx.optimizers import AdapterOptimizer, orthogonalised
from mlx_distill.backends.mlx.student import MlxStudent
from mlx_distill.batches import Batch, TokenRow, make_batch
from mlx_distill.config import TrainConfig
from mlx_distill.training import checkpoints
from mlx_distill.training.checkpoints import Cursor
from tests.training.runs import Recorder, settings

Floats = NDArray[np.float64]

OPTIMIZERS = ("adamw", "adam", "lion", "adafactor", "muon")
#: Every optimizer with every kind of adapter.
EACH = pytest.mark.parametrize(("optimizer", "adapter"), [(o, a) for o in OPTIMIZERS for a in ("lora", "dora")])

SHAPES = {"lora_a": (12, 3), "lora_b": (3, 7), "m": (7,), "experts": (2, 3, 5)}
DECAY = 0.3
RATES = (1e-2, 3e-2, 2e-2, 5e-3, 1e-3)


class Parameters(nn.Module):
    """One parameter of each shape that an adapter has."""

    def __init__(self, values: dict[str, Floats]) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, mx.array(value.astype(np.float32)))


def config(optimizer: str, **changes: Any) -> TrainConfig:
    return settings(Path("data"), Path("model"), Path("run"), optimizer=optimizer, **changes)


def draw(seed: int) -> dict[str, Floats]:
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape) for name, shape in SHAPES.items()}


def gradients() -> list[dict[str, Floats]]:
    """At the first step the first factor has none, as the second is zero."""
    drawn = [draw(seed) for seed in range(1, 1 + len(RATES))]
    drawn[0]["lora_a"] = np.zeros(SHAPES["lora_a"])
    return drawn


# The formulas of the papers, in float64. Each takes a parameter through all steps.


def adam(value: Floats, steps: list[Floats], decay: float) -> Floats:
    m, v = np.zeros_like(value), np.zeros_like(value)
    for t, (g, rate) in enumerate(zip(steps, RATES, strict=True), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        value = value * (1 - rate * decay) - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return value


def lion(value: Floats, steps: list[Floats], decay: float) -> Floats:
    m = np.zeros_like(value)
    for g, rate in zip(steps, RATES, strict=True):
        value = value - rate * (np.sign(0.9 * m + 0.1 * g) + decay * value)
        m = 0.99 * m + 0.01 * g
    return value


def adafactor(value: Floats, steps: list[Floats], decay: float) -> Floats:
    """Algorithms 4 and 5 of the paper, without momentum, with a given learning rate."""
    rows = columns = whole = np.zeros(())
    for t, (g, rate) in enumerate(zip(steps, RATES, strict=True), start=1):
        keep = 1 - t**-0.8
        squares = g**2 + 1e-30
        if g.ndim > 1:
            rows = keep * rows + (1 - keep) * squares.mean(axis=-1)
            columns = keep * columns + (1 - keep) * squares.mean(axis=-2)
            estimate = rows[..., :, None] * columns[..., None, :] / rows.mean(axis=-1)[..., None, None]
        else:
            estimate = whole = keep * whole + (1 - keep) * squares
        update = g / np.sqrt(estimate)
        update /= max(1.0, float(np.sqrt((update**2).mean())))
        value = value - rate * (update + decay * value)
    return value


def muon(value: Floats, steps: list[Floats], decay: float) -> Floats:
    if value.ndim == 1:
        return adam(value, steps, decay)
    m = np.zeros_like(value)
    for g, rate in zip(steps, RATES, strict=True):
        m = 0.95 * m + 0.05 * g
        ahead = 0.95 * m + 0.05 * g
        parts = ahead.reshape(-1, *ahead.shape[-2:])
        update = np.stack([newton_schulz(part) for part in parts]).reshape(value.shape)
        value = value - rate * (0.2 * np.sqrt(max(value.shape[-2:])) * update + decay * value)
    return value


def newton_schulz(matrix: Floats) -> Floats:
    """On singular values themselves: the iteration is an odd polynomial, so it leaves the vectors as they are."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / (np.sqrt((values**2).sum()) + 1e-7)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return np.asarray(left @ np.diag(values) @ right)


FORMULAS: dict[str, tuple[Callable[[Floats, list[Floats], float], Floats], float]] = {
    "adamw": (adam, DECAY),
    "adam": (adam, 0.0),
    "lion": (lion, DECAY),
    "adafactor": (adafactor, DECAY),
    "muon": (muon, DECAY),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_update_is_that_of_the_paper(optimizer: str) -> None:
    """To the roundings of float32: some dozens a value and step, each 6e-8 of it."""
    start, steps = draw(0), gradients()
    model = Parameters(start)
    rule = AdapterOptimizer(config(optimizer, weight_decay=DECAY), model)
    for step, rate in zip(steps, RATES, strict=True):
        rule.update(model, {name: mx.array(g.astype(np.float32)) for name, g in step.items()}, rate)
    formula, decay = FORMULAS[optimizer]
    for name, value in start.items():
        expected = formula(value, [step[name] for step in steps], decay if value.ndim > 1 else 0.0)
        np.testing.assert_allclose(np.array(model[name]), expected, rtol=1e-5, atol=2e-6, err_msg=name)
        assert np.abs(expected - value).max() > 1e-2


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_without_a_gradient_only_decay_moves_and_only_matrices(optimizer: str) -> None:
    start = draw(0)
    model = Parameters(start)
    rule = AdapterOptimizer(config(optimizer, weight_decay=DECAY), model)
    for rate in RATES:
        rule.update(model, {name: mx.zeros(shape) for name, shape in SHAPES.items()}, rate)
    left = 1.0 if optimizer == "adam" else float(np.prod([1 - rate * DECAY for rate in RATES]))
    for name, value in start.items():
        share = left if value.ndim > 1 else 1.0
        np.testing.assert_allclose(np.array(model[name]), value.astype(np.float32) * share, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_learning_rate_alone_says_how_far_a_step_goes(optimizer: str) -> None:
    """Ten times the rate, ten times the way, for every parameter, those that are zero included."""
    moved = []
    for factor in (1.0, 10.0):
        model = Parameters({name: np.zeros(shape) for name, shape in SHAPES.items()})
        rule = AdapterOptimizer(config(optimizer, weight_decay=0.0, learning_rate=99.0), model)
        rule.update(model, {name: mx.array(g.astype(np.float32)) for name, g in draw(1).items()}, factor * 1e-3)
        moved.append({name: np.array(model[name]) for name in SHAPES})
    for name, way in moved[0].items():
        np.testing.assert_allclose(moved[1][name], 10 * way, rtol=1e-5, err_msg=name)
        assert 1e-4 < np.sqrt((way**2).mean()) < 1.1e-3


def test_orthogonalising_keeps_directions_and_levels_lengths() -> None:
    generator = np.random.default_rng(3)
    for shape in ((12, 3), (3, 12), (5, 5)):
        matrix = generator.standard_normal(shape).astype(np.float32)
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        found = left.T @ np.array(orthogonalised(mx.array(matrix))) @ right.T
        off = found - np.diag(np.diag(found))
        assert np.abs(off).max() < 1e-4
        assert values.max() / values.min() > 1.5
        assert np.all((np.diag(found) > 0.6) & (np.diag(found) < 1.25))


def test_experts_are_orthogonalised_each_for_itself() -> None:
    experts = mx.array(np.random.default_rng(4).standard_normal((3, 4, 9)).astype(np.float32))
    together = np.array(orthogonalised(experts))
    for at in range(3):
        np.testing.assert_allclose(together[at], np.array(orthogonalised(experts[at])), atol=1e-6)


# In a student


def rows(seed: int) -> list[TokenRow]:
    generator = np.random.default_rng(seed)
    made = []
    for length in (9, 30, 17, 24):
        mask = generator.random(length) < 0.6
        mask[0], mask[-1] = False, True
        made.append(TokenRow(generator.integers(1, 300, length).astype(np.int32), mask))
    return made


BATCHES: list[list[Batch]] = [[make_batch(rows(seed), [0, 1]), make_batch(rows(seed), [2, 3])] for seed in range(6)]


def student(model: Path, optimizer: str, adapter: str, **changes: Any) -> MlxStudent:
    chosen = {"optimizer": optimizer, "adapter": adapter, "dropout": 0.2, **changes}
    return MlxStudent(model, settings(Path("data"), model, Path("run"), **chosen))


@EACH
def test_a_student_saved_and_restored_goes_on_to_the_bit(
    tmp_path: Path, tiny_model: Path, optimizer: str, adapter: str
) -> None:
    """Through a checkpoint on the disk, into a student that has been elsewhere."""
    rates = (1e-3, 5e-3, 4e-3, 3e-3, 2e-3, 1e-3)
    whole = student(tiny_model, optimizer, adapter)
    expected = [whole.step(batch, rate) for batch, rate in zip(BATCHES, rates, strict=True)]
    first = student(tiny_model, optimizer, adapter)
    found = [first.step(batch, rate) for batch, rate in zip(BATCHES[:3], rates[:3], strict=True)]
    checkpoints.save(tmp_path, Cursor(step=3), first.state(), keep=1)
    loaded = checkpoints.newest(tmp_path, Recorder())
    assert loaded is not None
    second = student(tiny_model, optimizer, adapter)
    second.step(BATCHES[5], 0.1)
    second.restore(loaded[1])
    assert same(second.state(), first.state())
    found += [second.step(batch, rate) for batch, rate in zip(BATCHES[3:], rates[3:], strict=True)]
    assert found == expected
    assert same(second.state(), whole.state())


def same(first: State, second: State) -> bool:
    return first.arrays.keys() == second.arrays.keys() and all(
        value.dtype == second.arrays[name].dtype and np.array_equal(value, second.arrays[name])
        for name, value in first.arrays.items()
    )


@EACH
def test_every_optimizer_learns(tiny_model: Path, optimizer: str, adapter: str) -> None:
    one = student(tiny_model, optimizer, adapter, dropout=0.0, layers="all", rank=8)
    rate = {"muon": 5e-2}.get(optimizer, 1e-2)
    losses = [one.step(BATCHES[0], rate).loss for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_decay_leaves_doras_magnitudes_alone(tiny_model: Path, optimizer: str) -> None:
    """A decay that leaves nothing of the factors moves the magnitudes no more than none does."""
    found = {}
    for decay in (0.0, 20.0):
        one = student(tiny_model, optimizer, "dora", dropout=0.0, weight_decay=decay)
        start = one.state().arrays
        one.step(BATCHES[0], 5e-2)
        found[decay] = one.state().arrays
    for name in (name for name in start if name.startswith("adapter.")):
        if name.endswith(".m"):
            np.testing.assert_array_equal(found[0.0][name], found[20.0][name], err_msg=name)
            assert not np.array_equal(found[0.0][name], start[name])
        elif name.endswith("lora_a"):
            # The first step has no gradient for it: decay alone, which takes all.
            expected = start[name] if optimizer == "adam" else np.zeros_like(start[name])
            np.testing.assert_allclose(found[20.0][name], expected, atol=1e-7, err_msg=name)
