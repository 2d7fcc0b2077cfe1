"""Wherever MLX finds no memory for a student, the user is told what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import pytest

from mlx_distill.backends.mlx import loading
from mlx_distill.backends.mlx.linears import Layers
from mlx_distill.errors import ResourceError
from tests.backends.students import WHOLE, parameters, student

FULL = "[metal::malloc] Attempting to allocate 99 bytes"


def no_memory(*_: Any, **__: Any) -> Any:
    raise RuntimeError(FULL)


class Evaluations:
    """Stands for `mx.eval`, and fails the given time that it is called.

    Attributes:
        count: How often it was.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: int = -1, text: str = FULL) -> None:
        self.count = 0
        self._evaluate, self._fails, self._text = mx.eval, fails, text
        monkeypatch.setattr(mx, "eval", self)

    def __call__(self, *arrays: Any) -> None:
        self.count += 1
        if self.count == self._fails:
            raise RuntimeError(self._text)
        self._evaluate(*arrays)


def some_of(count: int) -> list[int]:
    """The first and the last of so many, and some between them."""
    return sorted({1, count, *range(1, count, max(1, count // 6))})


def refused(act: Callable[[], object]) -> str:
    """The advice."""
    with pytest.raises(ResourceError) as caught:
        act()
    assert caught.value.message == f"The machine is out of memory: {FULL}"
    assert caught.value.hint is not None
    return caught.value.hint


@pytest.mark.parametrize("changes", [{}, {"adapter": "dora"}, {"optimizer": "muon"}])
def test_whichever_evaluation_of_a_step_fails(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    one = student(tiny_model, **changes)
    with monkeypatch.context() as patch:
        counted = Evaluations(patch)
        one.step([WHOLE, WHOLE], 1e-3)
    assert counted.count > 3
    for fails in some_of(counted.count):
        with monkeypatch.context() as patch:
            Evaluations(patch, fails)
            advice = refused(lambda: one.step([WHOLE, WHOLE], 1e-3))
        assert advice.startswith("The last checkpoint, where there is one, stands.")
        assert "--micro-batch-size 1" in advice


def test_the_norm_may_be_what_fails(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = student(tiny_model)
    before = parameters(one)
    monkeypatch.setattr(optim, "clip_grad_norm", lambda tree, _: (tree, SimpleNamespace(item=no_memory)))
    refused(lambda: one.step([WHOLE], 1e-3))
    assert all((parameters(one)[name] == value).all() for name, value in before.items())


def test_whichever_evaluation_of_loading_fails(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        counted = Evaluations(patch)
        student(tiny_model)
    for fails in some_of(counted.count):
        with monkeypatch.context() as patch:
            Evaluations(patch, fails)
            advice = refused(lambda: student(tiny_model))
        assert "4-bit" in advice


def test_damaged_files_are_not_what_is_told_of_then(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_model", no_memory)
    for load in (lambda: student(tiny_model), lambda: Layers(tiny_model)):
        assert "4-bit" in refused(load)


def test_another_failure_is_not_called_one_of_memory(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = student(tiny_model)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="of another kind") as caught:
        Evaluations(patch, 2, "of another kind")
        one.step([WHOLE], 1e-3)
    assert not isinstance(caught.value, ResourceError)
