"""The fused head and loss against the plain ones, and which models have such a head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distill.backends.mlx.head import Head, evaluate_loss, find_head, fused_loss, plain_loss

WIDTH, WORDS, POSITIONS = 64, 300, 23


def tied() -> nn.Module:
    return nn.Embedding(WORDS, WIDTH)


def untied(*, bias: bool = False) -> nn.Module:
    return nn.Linear(WIDTH, WORDS, bias=bias)


def quantized(
    make: Callable[[], nn.Module], bits: int, group_size: int = 32, mode: str = "affine"
) -> Callable[[], nn.Module]:
    return lambda: make().to_quantized(group_size=group_size, bits=bits, mode=mode)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "tied": tied,
    "untied": untied,
    "biased": lambda: untied(bias=True),
    "tied-4": quantized(tied, 4),
    "tied-8": quantized(tied, 8),
    "untied-4": quantized(untied, 4),
    "untied-8": quantized(untied, 8, 64),
    "biased-4": quantized(lambda: untied(bias=True), 4),
    "tied-mxfp4": quantized(tied, 4, mode="mxfp4"),
    "untied-nvfp4": quantized(untied, 4, 16, mode="nvfp4"),
}


def make(kind: str, *, spread: float = 1.0, positions: int = POSITIONS) -> tuple[Head, mx.array, mx.array]:
    mx.random.seed(7)
    head = Head(MODULES[kind]())
    generator = np.random.default_rng(3)
    hidden = mx.array((spread * generator.standard_normal((positions, WIDTH))).astype(np.float32))
    targets = mx.array(generator.integers(0, WORDS, positions).astype(np.int32))
    return head, hidden, targets


def loss_and_gradient(loss: Callable[[mx.array], tuple[mx.array, mx.array]], hidden: mx.array) -> tuple[Any, Any, Any]:
    (value, correct), gradient = mx.value_and_grad(loss)(hidden)
    return np.array(value), np.array(correct), np.array(gradient)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("chunk", [1, 2, 7, POSITIONS - 1, POSITIONS, POSITIONS + 1, 256])
def test_the_fused_loss_and_gradient_are_the_plain_ones(kind: str, chunk: int) -> None:
    head, hidden, targets = make(kind)
    fused = loss_and_gradient(lambda h: fused_loss(head, h, targets, chunk=chunk), hidden)
    plain = loss_and_gradient(lambda h: plain_loss(head.logits(h), targets), hidden)
    np.testing.assert_allclose(fused[0], plain[0], rtol=1e-5)
    assert fused[1] == plain[1]
    np.testing.assert_allclose(fused[2], plain[2], rtol=1e-4, atol=1e-5 * np.abs(plain[2]).max())
    assert fused[2].dtype == np.float32


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("chunk", [1, 7, POSITIONS, 256])
def test_the_evaluated_loss_is_the_plain_one(kind: str, chunk: int) -> None:
    head, hidden, targets = make(kind)
    loss, correct = evaluate_loss(head, hidden, targets, chunk=chunk)
    expected, expected_correct = plain_loss(head.logits(hidden), targets)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert correct.item() == expected_correct.item()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(1, 70), st.sampled_from(sorted(MODULES)))
def test_any_number_of_positions_and_any_chunk(positions: int, chunk: int, kind: str) -> None:
    head, hidden, targets = make(kind, positions=positions)
    fused = loss_and_gradient(lambda h: fused_loss(head, h, targets, chunk=chunk), hidden)
    plain = loss_and_gradient(lambda h: plain_loss(head.logits(h), targets), hidden)
    np.testing.assert_allclose(fused[0], plain[0], rtol=1e-5)
    np.testing.assert_allclose(fused[2], plain[2], rtol=1e-4, atol=1e-5 * np.abs(plain[2]).max())


def test_the_gradient_is_that_of_finite_differences() -> None:
    """Against the loss alone, in float64 of numpy: not another program's idea of the gradient."""
    head, hidden, targets = make("tied", positions=3)
    _, _, gradient = loss_and_gradient(lambda h: fused_loss(head, h, targets, chunk=2), hidden)
    weight = np.array(head.module.weight, dtype=np.float64)
    wanted = np.array(targets)

    def loss(h: np.ndarray[Any, Any]) -> float:
        logits = h @ weight.T
        top = logits.max(axis=-1, keepdims=True)
        normaliser = np.log(np.exp(logits - top).sum(axis=-1)) + top[:, 0]
        return float((normaliser - logits[np.arange(len(h)), wanted]).sum())

    base = np.array(hidden, dtype=np.float64)
    for row, column in [(0, 0), (1, 17), (2, 63)]:
        step = np.zeros_like(base)
        step[row, column] = 1e-5
        slope = (loss(base + step) - loss(base - step)) / 2e-5
        assert gradient[row, column] == pytest.approx(slope, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("factor", [0.25, 1.0, -3.0])
def test_the_gradient_follows_what_the_loss_is_multiplied_by(factor: float) -> None:
    head, hidden, targets = make("untied")

    def scaled(h: mx.array) -> mx.array:
        return fused_loss(head, h * 2, targets, chunk=5)[0] * factor

    def plain(h: mx.array) -> mx.array:
        return plain_loss(head.logits(h * 2), targets)[0] * factor

    found, expected = np.array(mx.grad(scaled)(hidden)), np.array(mx.grad(plain)(hidden))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_large_logits_do_not_overflow() -> None:
    head, hidden, targets = make("tied", spread=1e4)
    loss, _, gradient = loss_and_gradient(lambda h: fused_loss(head, h, targets, chunk=5), hidden)
    expected, _, expected_gradient = loss_and_gradient(lambda h: plain_loss(head.logits(h), targets), hidden)
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-4 * np.abs(expected_gradient).max())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    head, hidden, targets = make("tied")
    hidden[4, 4] = bad
    loss, _, gradient = loss_and_gradient(lambda h: fused_loss(head, h, targets, chunk=5), hidden)
    assert not np.isfinite(loss)
    assert not np.isfinite(gradient).all()


@pytest.mark.parametrize("kind", MODULES)
def test_half_precision_stays_within_its_rounding_of_float32(kind: str) -> None:
    """bfloat16 keeps 8 bits, so single values are off by 0.4 %; a plain loss over whole logits is off by up to 6 %."""
    head, hidden, targets = make(kind)
    head.module.set_dtype(mx.bfloat16)
    half = hidden.astype(mx.bfloat16)
    (loss, _), gradient = mx.value_and_grad(lambda h: fused_loss(head, h, targets, chunk=5))(half)
    assert (loss.dtype, gradient.dtype) == (mx.float32, mx.bfloat16)
    head.module.set_dtype(mx.float32)
    expected, _, exact = loss_and_gradient(lambda h: plain_loss(head.logits(h), targets), half.astype(mx.float32))
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3)
    assert np.abs(np.array(gradient.astype(mx.float32)) - exact).max() < 0.015 * np.abs(exact).max()


def test_the_right_predictions_are_counted_exactly() -> None:
    head, hidden, _ = make("untied")
    best = mx.argmax(head.logits(hidden), axis=-1).astype(mx.int32)
    for right in (0, 1, POSITIONS // 2, POSITIONS):
        targets = mx.where(mx.arange(POSITIONS) < right, best, (best + 1) % WORDS)
        assert fused_loss(head, hidden, targets, chunk=4)[1].item() == right
        assert evaluate_loss(head, hidden, targets, chunk=4)[1].item() == right
        assert plain_loss(head.logits(hidden), targets)[1].item() == right


# Which models have such a head


class Body(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(WORDS, WIDTH)
        self.layer = nn.Linear(WIDTH, WIDTH)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.layer(self.embed_tokens(tokens))


class Model(nn.Module):
    """A model as mlx-lm builds them; `after` is what it does to its logits."""

    def __init__(self, *, tied: bool, after: Callable[[mx.array], mx.array] = lambda logits: logits) -> None:
        super().__init__()
        self.model = Body()
        self._after = after
        if not tied:
            self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        hidden = self.model(tokens)
        head = self.lm_head if "lm_head" in self else self.model.embed_tokens.as_linear
        return self._after(head(hidden))


@pytest.mark.parametrize("tied", [True, False])
def test_a_plain_head_is_found_and_is_the_models_own(tied: bool) -> None:
    mx.random.seed(1)
    model = Model(tied=tied)
    parts = find_head(model)
    assert parts is not None
    body, head = parts
    tokens = mx.array([[5, 9, 200, 7]])
    np.testing.assert_allclose(np.array(head.logits(body(tokens)[0])), np.array(model(tokens)[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "after",
    [
        lambda logits: logits / 8,
        lambda logits: logits * 1.05,
        lambda logits: mx.tanh(logits / 0.5) * 0.5,
        lambda logits: logits + mx.arange(WORDS) * 0.01,
        lambda logits: logits[..., :-1],
    ],
    ids=["scale", "small-scale", "soft-cap", "bias", "fewer-words"],
)
def test_a_model_that_changes_its_logits_has_no_such_head(tied: bool, after: Callable[[mx.array], mx.array]) -> None:
    mx.random.seed(1)
    assert find_head(Model(tied=tied, after=after)) is None


def test_a_soft_cap_is_found_however_small_the_logits() -> None:
    """Gemma 2's cap of 30 hardly bends the logits of eight arbitrary tokens, and much those of a text."""
    mx.random.seed(1)
    assert find_head(Model(tied=False, after=lambda logits: mx.tanh(logits / 30) * 30)) is None


class Split(nn.Module):
    """Body and head, but the model takes a different way to its logits."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Body()
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        self.norm = nn.RMSNorm(WIDTH)

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.lm_head(self.norm(self.model(tokens)))


class Headless(nn.Module):
    def __call__(self, tokens: mx.array) -> mx.array:
        return mx.zeros((*tokens.shape, WORDS))


class Pair(Body):
    def __call__(self, tokens: mx.array) -> Any:
        return super().__call__(tokens), None


class TwoResults(Model):
    def __init__(self) -> None:
        super().__init__(tied=True)
        self.model = Pair()

    def __call__(self, tokens: mx.array) -> mx.array:
        return self.model.embed_tokens.as_linear(self.model(tokens)[0])


@pytest.mark.parametrize("kind", [Split, Headless, TwoResults])
def test_another_structure_has_no_such_head(kind: Callable[[], nn.Module]) -> None:
    assert find_head(kind()) is None
