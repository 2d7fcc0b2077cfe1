"""The two backends compute the same: losses, gradients, updates, from the same start on the same batches.

torch differentiates transformers' own model under peft's own adapter, with whole logits and a plain cross-entropy; the
MLX backend shares none of that. What both agree on is right.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mlx_distill.backends.mlx.student import MlxStudent
from mlx_distill.backends.torch.student import TorchStudent
from mlx_distill.batches import Batch, make_batch
from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.training.schedule import learning_rate
from tests.backends.students import ROWS, WHOLE, quantize, random_rows, student
from tests.tiny import make_tiny_model
from tests.training.runs import settings


def reference(model: Path, **changes: Any) -> TorchStudent:
    return TorchStudent(model, settings(Path("data"), model, Path("run"), backend="torch", device="cpu", **changes))


@pytest.fixture(
    scope="module",
    params=["qwen2-tied", "llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2", "llama-tied"))],
)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, _, tied = request.param.partition("-")
    return make_tiny_model(tmp_path_factory.mktemp("parity") / "model", architecture=architecture, tied=bool(tied))


def batches(count: int, *, seed: int = 3) -> list[Batch]:
    """Of rows with one target, of rows that are nearly all targets, and of rows of several turns."""
    generator = np.random.default_rng(seed)
    made = []
    for at in range(count):
        rows = random_rows(generator.integers(4, 60, 4).tolist(), seed=at, share=(0.0, 0.3, 0.9)[at % 3])
        made.append(make_batch(rows, range(4)))
    return made


def gradients(one: MlxStudent | TorchStudent, micro_batches: Sequence[Batch]) -> dict[str, NDArray[np.float32]]:
    """Of the mean loss, unclipped. Both have an adapter that has learned something, so that no factor's is zero."""
    if isinstance(one, TorchStudent):
        one.step(micro_batches, 0.0)
        return one.gradients()
    total: dict[str, NDArray[np.float32]] = {}
    for batch in micro_batches:
        for name, value in one._passes.loss_and_gradients(batch)[1].items():
            total[name] = total.get(name, 0) + np.array(value)
    tokens = sum(batch.target_tokens for batch in micro_batches)
    return {name: value / tokens for name, value in total.items()}


def assert_near(found: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]], *, share: float) -> None:
    """Within a share of the largest value of each array."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= share * (np.abs(value).max() + 1e-12), name


def adapter(one: MlxStudent | TorchStudent) -> dict[str, NDArray[Any]]:
    return {name: value for name, value in one.state().arrays.items() if name.startswith("adapter.")}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers": "all", "rank": 3, "scale": 0.7, "rslora": True},
        {"targets": "q_proj,down_proj", "adapter": "dora"},
    ],
    ids=["lora", "rslora-all-layers", "dora-some-targets"],
)
def test_the_first_step_is_the_same(model: Path, changes: dict[str, Any]) -> None:
    """The start to the bit, gradients to 1e-5, and what is predicted right exactly."""
    ours, theirs = student(model, grad_clip=None, **changes), reference(model, grad_clip=None, **changes)
    start = adapter(ours)
    assert start.keys() == adapter(theirs).keys()
    for name, value in adapter(theirs).items():
        # A DoRA magnitude is a norm, which each library sums in its own order.
        np.testing.assert_allclose(value, start[name], rtol=1e-6 if name.endswith(".m") else 0)
    warm = ours.step([WHOLE], 2e-2)
    assert theirs.step([WHOLE], 2e-2).loss == pytest.approx(warm.loss, rel=1e-5)
    # From here on from one and the same adapter.
    theirs.restore(ours.state())
    for batch in batches(3):
        assert_near(gradients(theirs, [batch]), gradients(ours, [batch]), share=1e-5)
        a, b = ours.evaluate(batch), theirs.evaluate(batch)
        assert b.loss == pytest.approx(a.loss, rel=1e-5)
        assert (a.correct, a.target_tokens, a.tokens) == (b.correct, b.target_tokens, b.tokens)


def test_accumulated_gradients_are_the_same(model: Path) -> None:
    ours, theirs = student(model, grad_clip=None), reference(model, grad_clip=None)
    ours.step([WHOLE], 2e-2)
    theirs.restore(ours.state())
    parts = [make_batch(ROWS, [at]) for at in range(8)]
    expected = gradients(ours, [WHOLE])
    assert_near(gradients(theirs, parts), expected, share=1e-5)
    assert_near(gradients(ours, parts), expected, share=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": 0.0, "grad_clip": None, "schedule": "constant"},
        {"weight_decay": 0.5, "grad_clip": 0.3, "schedule": "cosine", "warmup": 0.2},
        {"optimizer": "adam", "schedule": "linear", "adapter": "dora"},
    ],
    ids=["plain", "decay-clip-cosine", "adam-linear-dora"],
)
def test_fifty_steps_are_the_same(model: Path, changes: dict[str, Any]) -> None:
    """Losses to 1e-4, in micro-batches that differ from step to step."""
    ours, theirs = student(model, **changes), reference(model, **changes)
    config = settings(Path("data"), model, Path("run"), **changes)
    for at, batch in enumerate(batches(50)):
        rate = learning_rate(config, at, 50)
        parts = [batch] if at % 2 else [_rows(batch, 0, 1), _rows(batch, 1, 4)]
        a, b = ours.step(parts, rate), theirs.step(parts, rate)
        assert b.loss == pytest.approx(a.loss, rel=1e-4), at
        assert b.grad_norm == pytest.approx(a.grad_norm, rel=1e-3), at


def _rows(batch: Batch, first: int, last: int) -> Batch:
    return Batch(*(getattr(batch, name)[first:last] for name in ("tokens", "loss_mask", "lengths", "rows")))


@pytest.mark.parametrize("begins", ["mlx", "torch"])
def test_what_one_begins_the_other_goes_on_with(model: Path, begins: str) -> None:
    """Adapter and optimizer are carried over: ten steps of one, or five of each."""
    work = batches(10)
    alone = student(model)
    expected = [alone.step([batch], 5e-3).loss for batch in work]
    first, second = (student(model), reference(model))[:: 1 if begins == "mlx" else -1]
    found = [first.step([batch], 5e-3).loss for batch in work[:5]]
    second.restore(first.state())
    found += [second.step([batch], 5e-3).loss for batch in work[5:]]
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["mps", "cuda"])
def test_a_gpu_learns_the_same(model: Path, name: str) -> None:
    """Where there is one: not on the machine where this was written."""
    if not {"mps": torch.backends.mps, "cuda": torch.cuda}[name].is_available():
        pytest.skip(f"no {name} here")
    config = settings(Path("data"), model, Path("run"), backend="torch", device=name)
    ours, theirs = student(model), TorchStudent(model, config)
    for batch in batches(10):
        assert theirs.step([batch], 5e-3).loss == pytest.approx(ours.step([batch], 5e-3).loss, rel=1e-3)
    assert theirs.peak_memory_bytes() > 0
    assert theirs.measure(WHOLE, checkpointing=True) > 0


@pytest.mark.slow
def test_smollm2_learns_the_same(smollm2: Path) -> None:
    ours, theirs = student(smollm2, layers=2), reference(smollm2, layers=2)
    generator = np.random.default_rng(5)
    for at in range(50):
        rows = random_rows(generator.integers(6, 11, 1).tolist(), seed=at, share=0.5)
        batch = make_batch(rows, range(1))
        a, b = ours.step([batch], 1e-4), theirs.step([batch], 1e-4)
        assert b.loss == pytest.approx(a.loss, rel=1e-4), at
        assert a.correct == b.correct


def test_an_adapter_has_one_format(model: Path, tmp_path: Path) -> None:
    ours, theirs = student(model, adapter="dora"), reference(model, adapter="dora")
    for one, name in ((ours, "ours"), (theirs, "theirs")):
        one.step([WHOLE], 2e-2)
        (tmp_path / name).mkdir()
        one.save_adapter(tmp_path / name)
    settings_of = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs")]
    assert settings_of[0] == settings_of[1]
    losses = ours.evaluate(WHOLE).loss, theirs.evaluate(WHOLE).loss
    ours.load_adapter(tmp_path / "theirs")
    theirs.load_adapter(tmp_path / "ours")
    assert (theirs.evaluate(WHOLE).loss, ours.evaluate(WHOLE).loss) == pytest.approx(losses, rel=1e-5)


def test_resume_is_exact_on_the_cpu(model: Path) -> None:
    """With dropout, whose random state is part of what is kept."""
    work = batches(6)
    whole = reference(model, dropout=0.3)
    for batch in work[:3]:
        whole.step([batch], 5e-3)
    kept = whole.state()
    expected = [whole.step([batch], 5e-3) for batch in work[3:]]
    other = reference(model, dropout=0.3)
    other.step([work[0]], 1e-2)
    other.restore(kept)
    assert [other.step([batch], 5e-3) for batch in work[3:]] == expected
    for name, value in whole.state().arrays.items():
        assert np.array_equal(other.state().arrays[name], value), name


def test_a_gradient_that_is_not_finite_does_not_touch_the_adapter(model: Path) -> None:
    one = reference(model)
    one.step([WHOLE], 5e-3)
    kept = one.state()
    broken = {name: np.full_like(v, np.inf) if name.endswith("0.lora_b") else v for name, v in kept.arrays.items()}
    name = next(name for name in broken if name.startswith("adapter.") and name.endswith("lora_b"))
    broken[name] = np.full_like(broken[name], np.inf)
    one.restore(type(kept)(broken))
    stats = one.step([WHOLE], 5e-3)
    assert not np.isfinite(stats.loss_sum)
    found = one.state().arrays
    for key, value in broken.items():
        if key.startswith("adapter."):
            assert np.array_equal(found[key], value), key


@pytest.mark.parametrize("checkpointing", [False, True])
def test_measuring_learns_nothing_and_grows_with_the_batch(model: Path, checkpointing: bool) -> None:
    one = reference(model, dropout=0.2, layers="all")
    before = adapter(one)
    small, large = (make_batch(random_rows([size] * 4, seed=1, share=0.5), range(4)) for size in (32, 64))
    sizes = [one.measure(batch, checkpointing=checkpointing) for batch in (small, large)]
    assert 0 < sizes[0] < sizes[1]
    for name, value in adapter(one).items():
        assert np.array_equal(value, before[name])


def test_checkpointing_takes_less_and_changes_nothing(model: Path) -> None:
    one = reference(model, layers="all")
    batch = make_batch(random_rows([64] * 4, seed=1, share=0.5), range(4))
    plain = one.measure(batch, checkpointing=False)
    expected = gradients(one, [batch])
    assert one.measure(batch, checkpointing=True) < plain
    one._checkpoint(True)
    assert_near(gradients(one, [batch]), expected, share=1e-6)


@pytest.mark.parametrize("optimizer", ["lion", "adafactor", "muon"])
def test_an_optimizer_that_torch_has_otherwise_is_refused(model: Path, optimizer: str) -> None:
    with pytest.raises(ConfigError, match="--backend mlx"):
        reference(model, optimizer=optimizer)


def test_a_device_that_is_not_there_is_refused(model: Path) -> None:
    with pytest.raises(ConfigError, match="Choose cpu, or auto"):
        TorchStudent(model, settings(Path("data"), model, Path("run"), backend="torch", device="cuda"))


def test_a_base_quantized_for_mlx_is_refused(tmp_path: Path) -> None:
    quantized = quantize(make_tiny_model(tmp_path / "model"), 4)
    with pytest.raises(ModelError, match="--backend mlx"):
        reference(quantized)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": 9}, "has 4 layers"),
        ({"rank": 65}, "has rank"),
        ({"targets": "q_prj"}, "did you mean q_proj"),
    ],
)
def test_what_cannot_be_adapted_is_refused_as_by_mlx(model: Path, changes: dict[str, Any], says: str) -> None:
    messages = []
    for make in (student, reference):
        with pytest.raises(ConfigError, match=says) as caught:
            make(model, **changes)
        messages.append(caught.value.message)
    assert messages[0] == messages[1]
