"""The layer whose gradient is written out, against MLX's own differentiation of the same layer."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_distill.backends.mlx.attention import BLOCK, attend, attend_gradient
from mlx_distill.backends.mlx.block import find_block
from mlx_distill.backends.mlx.frozen_rows import InMemory, OnDisk
from mlx_distill.backends.mlx.head import find_head
from mlx_distill.backends.mlx.loading import attach_adapter, load_frozen
from mlx_distill.backends.mlx.passes import Passes
from mlx_distill.batches import TokenRow, make_batch
from mlx_distill.config import TrainConfig
from tests.tiny import Architecture, make_tiny_model
from tests.training.faults import SmallDisk

LENGTHS = [7, BLOCK, BLOCK + 1, 2 * BLOCK + 37]


def student_parts(folder: Path, *, layers: int = 2) -> Passes:
    """A model with an adapter whose every factor is filled, so that no gradient is zero."""
    config = TrainConfig(data=folder, run=folder, model=str(folder), layers=layers, rank=4)
    model, _ = load_frozen(folder, dtype="float32")
    parts = find_head(model)
    attach_adapter(model, config)
    generator = np.random.default_rng(1)
    filled = [
        (name, mx.array(generator.normal(0, 0.3, value.shape), dtype=mx.float32))
        for name, value in tree_flatten(model.trainable_parameters())
    ]
    model.update(tree_unflatten(filled))
    return Passes(model, parts, trained=layers, max_length=512)


def rows(count: int, length: int) -> list[TokenRow]:
    generator = np.random.default_rng(2)
    mask = generator.random((count, length)) < 0.6
    mask[:, 0] = False
    mask[:, -1] = True
    tokens = generator.integers(3, 250, (count, length)).astype(np.int32)
    return [TokenRow(t[: length - at], m[: length - at]) for at, (t, m) in enumerate(zip(tokens, mask, strict=True))]


def causal(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    length = queries.shape[3]
    hidden = mx.triu(mx.full((length, length), -mx.inf), k=1)
    scores = queries @ keys[:, :, None].swapaxes(-1, -2) + hidden
    return mx.softmax(scores, axis=-1) @ values[:, :, None]


@pytest.mark.parametrize("length", LENGTHS)
def test_attention_and_its_gradient_are_the_plain_formula(length: int) -> None:
    generator = np.random.default_rng(length)
    shapes = [(2, 2, 3, length, 8), (2, 2, length, 8), (2, 2, length, 8), (2, 2, 3, length, 8)]
    queries, keys, values, arriving = (mx.array(generator.standard_normal(s), dtype=mx.float32) for s in shapes)
    expected, back = mx.vjp(lambda *a: [causal(*a)], [queries, keys, values], [arriving])
    mx.eval(expected, back)
    out, log_sums = attend(queries, keys, values)
    assert np.allclose(out, expected[0], rtol=1e-4, atol=1e-5)
    found = attend_gradient(queries, keys, values, out, log_sums, arriving)
    for one, other in zip(found, back, strict=True):
        assert np.allclose(one, other, rtol=1e-4, atol=1e-5 * float(np.abs(other).max()))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_loss_and_gradients_are_those_of_differentiation(
    tmp_path: Path, architecture: Architecture, length: int, checkpointing: bool
) -> None:
    passes = student_parts(make_tiny_model(tmp_path, architecture=architecture))
    assert "written out" in passes.ways
    batch = make_batch(rows(3, length), [0, 1, 2])
    passes.checkpointing = checkpointing
    (loss, correct, _), gradients = passes.loss_and_gradients(batch)
    found = passes.loss(batch)
    assert found.loss == pytest.approx(loss, rel=1e-6)
    assert (found.correct, found.divergence) == (correct, None)
    passes._stack = None
    (plain_loss, plain_correct, _), plain = passes.loss_and_gradients(batch)
    assert loss == pytest.approx(plain_loss, rel=1e-5)
    assert correct == plain_correct
    assert gradients.keys() == plain.keys()
    for name, value in plain.items():
        scale = float(np.abs(value).max())
        assert scale > 0
        assert np.abs(np.asarray(gradients[name]) - np.asarray(value)).max() <= 1e-4 * scale, name


def test_checkpointing_changes_no_bit(tmp_path: Path) -> None:
    passes = student_parts(make_tiny_model(tmp_path, architecture="llama"))
    batch = make_batch(rows(3, 200), [0, 1, 2])
    (loss, _, _), gradients = passes.loss_and_gradients(batch)
    passes.checkpointing = True
    (again, _, _), twice = passes.loss_and_gradients(batch)
    assert loss == again
    assert all(np.array_equal(gradients[name], twice[name]) for name in gradients)


def test_kept_rows_change_no_bit_wherever_they_are_kept(tmp_path: Path) -> None:
    passes = student_parts(make_tiny_model(tmp_path, architecture="llama"), layers=1)
    batch = make_batch(rows(3, 150), [0, 1, 2])
    size = passes.prefix_token_bytes * batch.real_tokens
    assert size > 0
    expected = passes.loss_and_gradients(batch)
    for store in (None, InMemory(size), OnDisk(size, tmp_path), OnDisk(size // 2, tmp_path), InMemory(0)):
        passes.keep_rows(store)
        for _ in range(2):
            found = passes.loss_and_gradients(batch)
            assert found[0] == expected[0]
            assert all(np.array_equal(found[1][name], value) for name, value in expected[1].items())


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_a_store_gives_back_what_it_was_given_and_keeps_to_its_room(tmp_path: Path, dtype: mx.Dtype) -> None:
    values = [mx.random.normal((n, 5)).astype(dtype) for n in (3, 1, 8)]
    mx.eval(values)
    room = values[0].nbytes + values[1].nbytes
    for store in (InMemory(room), OnDisk(room, tmp_path)):
        for at, value in enumerate(values):
            store.keep(bytes([at]), value)
        for at, value in enumerate(values[:2]):
            kept = store.get(bytes([at]))
            assert kept is not None and kept.dtype == dtype and mx.array_equal(kept, value)
        assert store.get(bytes([2])) is None
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_gets_all_back_and_nothing_more_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = [mx.random.normal((n, 5)) for n in (3, 1, 8, 1)]
    mx.eval(values)
    disk = SmallDisk(monkeypatch, values[0].nbytes + values[1].nbytes + 7)
    store = OnDisk(1 << 20, tmp_path)
    for at, value in enumerate(values[:2]):
        store.keep(bytes([at]), value)
    held = store.get(b"\0")
    assert held is not None
    for at, value in enumerate(values[2:], start=2):
        store.keep(bytes([at]), value)
    assert [store.get(bytes([at])) for at in range(4)] == [None] * 4
    assert (disk.held(), disk.refused) == (0, 1)
    assert mx.array_equal(held, values[0])


def test_a_layer_that_does_something_else_is_no_block(tmp_path: Path) -> None:
    model, _ = load_frozen(make_tiny_model(tmp_path, architecture="llama"), dtype="float32")
    layer = model.layers[0]
    assert find_block(layer, "layer") is not None
    layer.self_attn.scale *= 1.5
    assert find_block(layer, "layer") is not None, "the scale is read off the layer"

    class Odd(type(layer)):  # type: ignore[misc]
        def __call__(self, *inputs: object, **options: object) -> mx.array:
            return super().__call__(*inputs, **options) * 1.01

    layer.__class__ = Odd
    assert find_block(layer, "layer") is None
