"""Dropout under gradient checkpointing: a layer that is computed twice has the same masks both times."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.backends.mlx.projection import Gradients
from mlx_distill.backends.mlx.stack import Found
from mlx_distill.backends.mlx.student import MlxStudent
from tests.backends.students import WHOLE, parameters, student

ADAPTERS = ("lora", "dora")


def dropping(model: Path, adapter: str, *, checkpointing: bool) -> MlxStudent:
    """A student with dropout, of whose adapter every factor is filled, so that no gradient is zero."""
    one = student(model, adapter=adapter, dropout=0.3, layers=3)
    generator = np.random.default_rng(1)
    flat = tree_flatten(one._model.trainable_parameters())
    filled = [(n, v + mx.array(generator.normal(0, 0.1, v.shape), dtype=mx.float32)) for n, v in flat]
    one._model.update(tree_unflatten(filled))
    one._passes.checkpointing = checkpointing
    return one


def draws(one: MlxStudent, times: int) -> list[tuple[Found, Gradients, list[int]]]:
    """Losses and gradients one after the other from one random state, and the state after each."""
    mx.random.seed(5)
    return [(*one._passes.loss_and_gradients(WHOLE), np.array(mx.random.state[0]).tolist()) for _ in range(times)]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_losses_gradients_and_random_state_are_those_without_checkpointing(tiny_model: Path, adapter: str) -> None:
    once = draws(dropping(tiny_model, adapter, checkpointing=False), 2)
    twice = draws(dropping(tiny_model, adapter, checkpointing=True), 2)
    for (found, gradients, state), (again, more, after) in zip(once, twice, strict=True):
        assert again.loss == pytest.approx(found.loss, rel=1e-6)
        assert again.correct == found.correct
        assert after == state
        assert more.keys() == gradients.keys()
        for name, value in gradients.items():
            scale = float(mx.abs(value).max().item())
            assert scale > 0
            assert mx.abs(more[name] - value).max().item() <= 1e-6 * scale, name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_every_step_has_masks_of_its_own(tiny_model: Path, adapter: str, checkpointing: bool) -> None:
    one = dropping(tiny_model, adapter, checkpointing=checkpointing)
    (first, gradients, state), (second, more, after) = draws(one, 2)
    assert first.loss != second.loss
    assert state != after
    assert all(not mx.array_equal(gradients[name], more[name]) for name in gradients)
    again = draws(one, 1)[0]
    assert again[0] == first
    assert all(mx.array_equal(gradients[name], again[1][name]) for name in gradients)


def test_the_gradient_is_that_of_finite_differences(tiny_model: Path) -> None:
    """The loss from one random state, along the gradient: not another program's idea of it. DoRA leaves a part out."""
    one = dropping(tiny_model, "lora", checkpointing=True)
    _, gradients, _ = draws(one, 1)[0]
    norm = np.sqrt(sum(float((value * value).sum().item()) for value in gradients.values()))
    start = dict(tree_flatten(one._model.trainable_parameters()))
    mx.eval(start)

    def at(step: float) -> float:
        moved = [(name, start[name] + (step / norm) * value) for name, value in gradients.items()]
        one._model.update(tree_unflatten(moved))
        return draws(one, 1)[0][0].loss

    step = 1e-2
    assert (at(step) - at(-step)) / (2 * step) == pytest.approx(norm, rel=1e-2)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_goes_on_from_a_state_is_the_same_to_the_bit(tiny_model: Path, adapter: str) -> None:
    one, other = (dropping(tiny_model, adapter, checkpointing=True) for _ in range(2))
    one.step([WHOLE], 1e-3)
    state = one.state()
    expected = one.step([WHOLE, WHOLE], 1e-3)
    mx.random.seed(99)
    other.restore(state)
    assert other.step([WHOLE, WHOLE], 1e-3) == expected
    found, wanted = parameters(other), parameters(one)
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
