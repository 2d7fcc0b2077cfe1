"""A quantized base: it trains as the float32 model that it stands for, keeps its weights, resumes and fuses."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import dequantize_model, load, load_model, quantize_model, save_model
from numpy.typing import NDArray
from safetensors.numpy import load_file

from mlx_distill.backends.base import NO_TOKENS, State, StepStats
from mlx_distill.backends.mlx.student import MlxStudent
from mlx_distill.batches import in_order, make_batch
from mlx_distill.config import FuseConfig
from mlx_distill.fuse import fuse
from mlx_distill.layout import RunFolder, file_sha256
from mlx_distill.training.run import train
from tests.backends.students import random_rows, student
from tests.fusing import quantize
from tests.tiny import make_tiny_model
from tests.training.runs import AtStep, make_data, outcome, settings

ADAPTERS = ("lora", "dora")


ROWS = random_rows((150, 33, 16, 7), seed=2, share=0.6)
WHOLE = make_batch(ROWS, range(4))


def over(one: MlxStudent) -> StepStats:
    return sum((one.evaluate(batch) for batch in in_order(ROWS, 2)), NO_TOKENS)


@pytest.fixture(params=[4, pytest.param(8, marks=pytest.mark.slow)])
def bits(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=["float32", "bfloat16"])
def base(request: pytest.FixtureRequest, tmp_path: Path, bits: int) -> Path:
    """As `mlx_lm.convert -q` writes it; its scales are of the type that the weights had."""
    folder = make_tiny_model(tmp_path / "base")
    model, description = load_model(folder)
    model.set_dtype(getattr(mx, request.param))
    model, description = quantize_model(model, description, group_size=32, bits=bits)
    save_model(folder, model, donate_model=True)
    (folder / "config.json").write_text(json.dumps(description), encoding="utf-8")
    return folder


@pytest.fixture
def dense(base: Path, tmp_path: Path) -> Path:
    """The float32 model that the quantized one stands for."""
    folder = tmp_path / "dense"
    shutil.copytree(base, folder)
    model, description = load_model(base)
    model.set_dtype(mx.float32)
    save_model(folder, dequantize_model(model), donate_model=True)
    for key in ("quantization", "quantization_config"):
        description.pop(key)
    (folder / "config.json").write_text(json.dumps(description), encoding="utf-8")
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def adapter(state: State) -> dict[str, NDArray[Any]]:
    return {name: value for name, value in state.arrays.items() if name.startswith("adapter.")}


def gradients(one: MlxStudent) -> tuple[StepStats, dict[str, NDArray[Any]]]:
    """Ten times Adam's first moment after its first step."""
    stats = one.step([make_batch(ROWS, [0, 1]), make_batch(ROWS, [2, 3])], 1e-3)
    moments = one.state().arrays.items()
    return stats, {n: v * 10 for n, v in moments if n.startswith("optimizer.") and n.endswith(".m")}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_gradient_is_that_of_the_model_it_stands_for(base: Path, dense: Path, kind: str, tmp_path: Path) -> None:
    """The same products, added up in another order.

    A sum of n float32 products is off by n · 6e-8 of its terms at worst and by √n · 6e-8 in the mean; here n is at most
    128 and a gradient passes some thirty such sums, one into the next: √(30 · 128) · 6e-8 = 4e-6 of the largest value,
    and thrice that is allowed. A base off by one step of its quantization would differ by 1e-2.
    """
    start = student(base, adapter=kind)
    for _ in range(3):
        start.step([WHOLE], 1e-2)
    start.save_adapter(tmp_path / "start")
    found = []
    for folder in (base, dense):
        one = student(folder, adapter=kind, optimizer="adam", grad_clip=None)
        one.load_adapter(tmp_path / "start")
        found.append((over(one), *gradients(one)))
    (loss, stats, ours), (dense_loss, dense_stats, theirs) = found
    assert loss.loss == pytest.approx(dense_loss.loss, rel=1e-5)
    assert stats.loss_sum == pytest.approx(dense_stats.loss_sum, rel=1e-5)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        largest = np.abs(value).max()
        assert largest > 1e-5, name
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=1.2e-5 * largest, err_msg=name)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_it_learns_and_its_weights_stay(base: Path, kind: str) -> None:
    files = digests(base)
    one = student(base, adapter=kind, rank=8, layers="all", weight_decay=0.5)
    start, before = one.state(), over(one)
    losses = [one.step([WHOLE], 1e-2).loss for _ in range(12)]
    assert losses[-1] < 0.8 * losses[0]
    assert over(one).loss < 0.8 * before.loss
    one.restore(start)
    assert over(one) == before
    assert digests(base) == files
    assert {name.rpartition(".")[2] for name in adapter(start)} <= {"lora_a", "lora_b", "m"}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_kept_rows_change_no_bit(tmp_path: Path, base: Path, kind: str) -> None:
    data = make_data(tmp_path / "data")
    left = []
    for place in ("off", "memory", "disk"):
        run = tmp_path / place
        train(settings(data, base, run, adapter=kind, dropout=0.1, prefix_cache=place))
        left.append((RunFolder(run).adapter.read_bytes(), [{**row} for row in outcome(run)[1]]))
    assert left[1] == left[0]
    assert left[2] == left[0]


@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_interrupted_run_ends_as_a_whole_one(tmp_path: Path, base: Path, kind: str) -> None:
    data = make_data(tmp_path / "data")

    def config(name: str) -> Any:
        return settings(data, base, tmp_path / name, adapter=kind, dropout=0.1, epochs=1)

    train(config("whole"))
    expected = outcome(tmp_path / "whole")
    for step in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            train(config(f"cut{step}"), AtStep(step, lambda: signal.raise_signal(signal.SIGINT)))
        train(config(f"cut{step}"))
        assert outcome(tmp_path / f"cut{step}") == expected


@pytest.mark.parametrize("kind", ADAPTERS)
def test_the_fused_model_is_quantized_and_near(tmp_path: Path, base: Path, bits: int, kind: str) -> None:
    """Quantizing the sum again rounds it: at 8 bits hardly, at 4 to some part of what was learned."""
    run = tmp_path / "run"
    train(settings(make_data(tmp_path / "data"), base, run, adapter=kind, epochs=4, learning_rate=0.02))
    fuse(FuseConfig(run=run, quantized_base="requantize"))
    description = json.loads((run / "fused" / "config.json").read_text(encoding="utf-8"))
    assert description["quantization"] == {"group_size": 32, "bits": bits, "mode": "affine"}
    before, after = (mx.load(str(folder / "model.safetensors")) for folder in (base, run / "fused"))
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert {n: (v.shape, v.dtype) for n, v in before.items()} == {n: (v.shape, v.dtype) for n, v in after.items()}
    same = before["model.layers.3.mlp.up_proj.scales"].dtype
    for name in ("model.layers.3.mlp.up_proj", "model.layers.2.self_attn.k_proj"):
        codes, scales, biases = mx.quantize(mx.array(exact_sum(before, run, name)).astype(same), 32, bits)
        # A value that float32 rounds the other way may tip a code, or a scale of half precision.
        assert np.array(after[f"{name}.weight"] == codes).mean() > 0.98
        for part, value in (("scales", scales), ("biases", biases)):
            assert np.array(mx.isclose(after[f"{name}.{part}"], value, rtol=1e-5)).mean() > 0.98
    expected, far, near = (logits(base, run), logits(base), logits(run / "fused"))
    assert np.abs(near - expected).mean() < np.abs(far - expected).mean() / {4: 2, 8: 15}[bits]


def exact_sum(base: dict[str, mx.array], run: Path, name: str) -> NDArray[np.float64]:
    """What base and adapter make of a matrix, in float64."""
    parts = [base[f"{name}.weight"], *(base[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases"))]
    # A group of 32 values of b bits fills b words of 32.
    bits = parts[0].shape[1] // parts[1].shape[1]
    weight = np.array(mx.dequantize(*parts, group_size=32, bits=bits)).astype(np.float64)
    learned = {key: np.array(value).astype(np.float64) for key, value in load_file(RunFolder(run).adapter).items()}
    weight += 2.0 * (learned[f"{name}.lora_a"] @ learned[f"{name}.lora_b"]).T
    if f"{name}.m" in learned:
        weight *= (learned[f"{name}.m"] / np.linalg.norm(weight, axis=1))[:, None]
    return weight


def logits(folder: Path, run: Path | None = None) -> NDArray[Any]:
    model, _ = load(str(folder), adapter_path=None if run is None else str(run))
    model.set_dtype(mx.float32)
    return np.array(model(mx.array(ROWS[1].tokens[None])))[0]


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4"])
def test_a_base_whose_scales_are_bytes_trains(tmp_path: Path, mode: str) -> None:
    folder = quantize(make_tiny_model(tmp_path / "base"), 4, mode=mode)
    one = student(folder)
    before = over(one)
    for _ in range(8):
        one.step([WHOLE], 2e-2)
    assert over(one).loss < before.loss * 0.9
