"""The kinds of adapter: LoRA and DoRA, rank-stabilised or not, on some matrices or all: start, gradient, layout."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load
from numpy.typing import NDArray

from mlx_distill.backends.mlx.student import MlxStudent
from mlx_distill.batches import Batch, TokenRow, make_batch
from tests.backends.students import ROWS, WHOLE, mean_loss, over, parameters, quantize, student, trained
from tests.tiny import make_tiny_model

Floats = NDArray[np.float64]

#: Some of each kind; all go through the same tests.
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rslora": True, "rank": 6},
    "lora-some": {"targets": "q_proj, mlp.down_proj"},
    "dora": {"adapter": "dora"},
    "dora-rs-some": {"adapter": "dora", "rslora": True, "targets": "v_proj,o_proj,up_proj"},
}

EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def gradients(one: MlxStudent, batches: Sequence[Batch]) -> dict[str, Floats]:
    """The gradient of the mean loss: ten times Adam's first moment after its first step."""
    one.step(batches, 1e-3)
    return {
        name.removeprefix("optimizer.").removesuffix(".m"): value.astype(np.float64) * 10
        for name, value in one.state().arrays.items()
        if name.startswith("optimizer.") and name.endswith(".m")
    }


# The start


def test_a_magnitude_starts_as_the_norm_of_its_row(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "model")
    found = parameters(student(base, adapter="dora"))
    weights = mx.load(str(base / "model.safetensors"))
    assert isinstance(weights, dict)
    magnitudes = [name for name in found if name.endswith(".m")]
    assert len(magnitudes) == 2 * 7
    for name in magnitudes:
        weight = np.array(weights[f"{name.removesuffix('.m')}.weight"]).astype(np.float64)
        np.testing.assert_allclose(found[name], np.linalg.norm(weight, axis=1), rtol=1e-6)
        assert found[name].dtype == np.float32


def test_both_kinds_start_from_the_same_factors(tiny_model: Path) -> None:
    lora, dora = (parameters(student(tiny_model, adapter=kind, seed=3)) for kind in ("lora", "dora"))
    assert {name for name in dora if not name.endswith(".m")} == lora.keys()
    assert all(np.array_equal(value, dora[name]) for name, value in lora.items())


@EVERY_KIND
@pytest.mark.parametrize("bits", [None, 4])
def test_the_start_changes_nothing(tmp_path: Path, kind: str, bits: int | None) -> None:
    base = make_tiny_model(tmp_path / "model")
    if bits:
        quantize(base, bits)
    plain, _ = load(str(base))
    assert over(student(base, **KINDS[kind])).loss == pytest.approx(mean_loss(plain), rel=1e-5)


# What is trained is what mlx-lm loads


@EVERY_KIND
@pytest.mark.parametrize("base", ["qwen2", "llama", "qwen2-4", "llama-8"])
def test_an_adapter_says_in_mlx_lm_what_it_says_here(tmp_path: Path, kind: str, base: str) -> None:
    architecture, _, bits = base.partition("-")
    model = make_tiny_model(tmp_path / "model", architecture=architecture)
    if bits:
        quantize(model, int(bits))
    one = trained(model, **KINDS[kind])
    one.save_adapter(tmp_path / "run")
    theirs, _ = load(str(model), adapter_path=str(tmp_path / "run"))
    plain, _ = load(str(model))
    assert over(one).loss == pytest.approx(mean_loss(theirs), rel=1e-4)
    assert over(one).loss < 0.95 * mean_loss(plain)
    names = {name for name, _ in tree_flatten(theirs.parameters()) if name.rpartition(".")[2] in ("lora_a", "lora_b")}
    assert names == {name for name in parameters(one) if not name.endswith(".m")}


@EVERY_KIND
def test_what_was_saved_is_read_back_to_the_bit(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    one = trained(tiny_model, **KINDS[kind])
    one.save_adapter(tmp_path)
    other = student(tiny_model, **KINDS[kind], seed=9)
    assert over(other) != over(one)
    other.load_adapter(tmp_path)
    assert over(other) == over(one)
    assert all(np.array_equal(value, parameters(other)[name]) for name, value in parameters(one).items())


def test_the_layout_says_what_mlx_lm_needs(tmp_path: Path, tiny_model: Path) -> None:
    student(
        tiny_model, adapter="dora", rslora=True, rank=9, scale=1.5, dropout=0.1, targets="up_proj, q_proj"
    ).save_adapter(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8")) == {
        "fine_tune_type": "dora",
        "num_layers": 2,
        "lora_parameters": {
            "rank": 9,
            "scale": 1.5 * 3,
            "dropout": 0.1,
            "keys": ["mlp.up_proj", "self_attn.q_proj"],
        },
        "model": str(tiny_model),
    }


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_rank_stabilised_is_a_scale_by_the_root_of_the_rank(tiny_model: Path, adapter: str) -> None:
    one = trained(tiny_model, adapter=adapter, rank=4, scale=1.5, rslora=True)
    other = trained(tiny_model, adapter=adapter, rank=4, scale=3.0)
    assert all(np.array_equal(value, parameters(other)[name]) for name, value in parameters(one).items())
    assert over(one) != over(trained(tiny_model, adapter=adapter, rank=4, scale=1.5))


# The gradient, from the model's own weights and the chain rule by hand


@EVERY_KIND
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
def test_the_gradient_is_the_chain_rules(tmp_path: Path, kind: str, architecture: Any) -> None:
    """mlx-lm's plain model gives the gradient G of each whole matrix; numpy takes it to the adapter.

    LoRA's matrix is V = W + s (A B)ᵀ. DoRA's is diag(m / c) V with c the norms of V's rows, which count as constants
    (section 4.3 of its paper). Both sides add up float32 products over some hundred terms: 1e-5 of a sum.
    """
    base = make_tiny_model(tmp_path / "model", architecture=architecture)
    one = trained(base, **KINDS[kind])
    one.save_adapter(tmp_path / "run")
    values = {name: value.astype(np.float64) for name, value in parameters(one).items()}
    scale = json.loads((tmp_path / "run" / "adapter_config.json").read_text(encoding="utf-8"))["lora_parameters"][
        "scale"
    ]
    plain, _ = load(str(base))
    weights = {name: np.array(value).astype(np.float64) for name, value in tree_flatten(plain.parameters())}
    adapted = sorted({name.rpartition(".")[0] for name in values})
    sums = {at: weights[f"{at}.weight"] + scale * (values[f"{at}.lora_a"] @ values[f"{at}.lora_b"]).T for at in adapted}
    norms = {at: np.linalg.norm(sums[at], axis=1) for at in adapted}
    shares = {at: values[f"{at}.m"] / norms[at] if f"{at}.m" in values else np.ones(len(sums[at])) for at in adapted}
    whole = {at: mx.array((shares[at][:, None] * sums[at]).astype(np.float32)) for at in adapted}
    to_whole = gradients_of_weights(plain, whole)

    expected: dict[str, Floats] = {}
    for at in adapted:
        to_sum = shares[at][:, None] * to_whole[at]
        expected[f"{at}.lora_a"] = scale * to_sum.T @ values[f"{at}.lora_b"].T
        expected[f"{at}.lora_b"] = scale * values[f"{at}.lora_a"].T @ to_sum.T
        if f"{at}.m" in values:
            expected[f"{at}.m"] = (to_whole[at] * sums[at]).sum(axis=1) / norms[at]

    fresh = student(base, **KINDS[kind], optimizer="adam", grad_clip=None)
    fresh.load_adapter(tmp_path / "run")
    found = gradients(fresh, [WHOLE])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(value).max() > 1e-4, name
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=2e-5 * np.abs(value).max(), err_msg=name)


def gradients_of_weights(model: nn.Module, weights: dict[str, mx.array]) -> dict[str, Floats]:
    """Of the mean loss over all rows, by whole logits, one row at a time."""
    targets = sum(row.target_tokens for row in ROWS)

    def loss(given: dict[str, mx.array], row: TokenRow) -> mx.array:
        model.update(tree_unflatten([(f"{at}.weight", value) for at, value in given.items()]))
        places = mx.array(np.flatnonzero(row.loss_mask))
        logits = model(mx.array(row.tokens[None]))[0, places - 1]
        return nn.losses.cross_entropy(logits, mx.array(row.tokens)[places], reduction="sum") / targets

    total = {at: np.zeros(value.shape) for at, value in weights.items()}
    for row in ROWS:
        for at, value in mx.grad(lambda given, row=row: loss(given, row))(weights).items():
            total[at] += np.array(value)
    return total


def test_a_magnitudes_gradient_is_the_slope_of_the_loss(tiny_model: Path) -> None:
    """By finite differences of the loss itself: 4e-2 apart, as float32 gives a loss to 1e-7."""
    one = trained(tiny_model, adapter="dora", optimizer="adam", grad_clip=None)
    state = one.state()
    name = "adapter.model.layers.3.mlp.down_proj.m"
    fresh = student(tiny_model, adapter="dora", optimizer="adam", grad_clip=None)
    start = fresh.state()
    fresh.restore(type(state)({**start.arrays, **{k: v for k, v in state.arrays.items() if k.startswith("adapter.")}}))
    found = gradients(fresh, [WHOLE])[name.removeprefix("adapter.")]
    steepest = np.argsort(-np.abs(found))[:4]
    for at in steepest:
        losses = []
        for by in (2e-2, -2e-2):
            moved = state.arrays[name].copy()
            moved[at] += np.float32(by)
            one.restore(type(state)({**state.arrays, name: moved}))
            losses.append(one.evaluate(WHOLE).loss)
        assert (losses[0] - losses[1]) / 4e-2 == pytest.approx(found[at], rel=1e-2)


# Accumulation

SIZES = st.permutations(range(8)).flatmap(
    lambda order: st.lists(st.integers(1, 7), max_size=6, unique=True).map(lambda cuts: (order, sorted(cuts)))
)


@pytest.mark.parametrize("adapter", ["lora", "dora"])
@examples(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(([0, 1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, 6, 7]))
@example(([7, 6, 5, 4, 3, 2, 1, 0], [4]))
@given(SIZES)
def test_any_micro_batches_have_the_gradient_of_the_whole(
    tiny_model: Path, adapter: str, split: tuple[list[int], list[int]]
) -> None:
    """Rows of one target beside rows of forty-five, in any order and company: the same sum over tokens.

    In float32 sums in another order differ by some 1e-7 of the largest; a mean of means would differ by half of it.
    """
    order, cuts = split
    edges = [0, *cuts, 8]
    parts = [make_batch(ROWS, order[a:b]) for a, b in itertools.pairwise(edges)]
    given = {"adapter": adapter, "optimizer": "adam", "grad_clip": None}
    start = trained(tiny_model, adapter=adapter).state()
    found = []
    for batches in ([WHOLE], parts):
        one = student(tiny_model, **given)
        own = one.state()
        one.restore(type(own)({**own.arrays, **{k: v for k, v in start.arrays.items() if k.startswith("adapter.")}}))
        found.append(gradients(one, batches))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, atol=5e-6 * np.abs(value).max(), rtol=0, err_msg=name)
