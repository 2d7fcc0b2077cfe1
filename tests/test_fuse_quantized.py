"""Fusing onto a quantized base: the way that holds is taken, and the other has its price. And what memory it takes."""

from __future__ import annotations

import gc
import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx_lm import generate
from mlx_lm.utils import load

from mlx_distill.agreement import Observation, agreement
from mlx_distill.backends.mlx import fusing
from mlx_distill.backends.mlx.fusing import fuse_into
from mlx_distill.backends.mlx.observing import observe_folder
from mlx_distill.cli.main import main
from mlx_distill.config import FuseConfig
from mlx_distill.errors import ModelError
from mlx_distill.fuse import TOLERANCES, fuse
from mlx_distill.layout import RunFolder
from mlx_distill.models.folder import read_config
from mlx_distill.probing import make_probe
from mlx_distill.runs import read_run
from tests.backends.students import student
from tests.fusing import left_behind, quantize, store_as, trained
from tests.tiny import make_tiny_model, random_weights
from tests.training.runs import Recorder

ADAPTED = [
    f"model.layers.{layer}.{part}"
    for layer in (2, 3)
    for part in (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
]


def quantized(folder: Path, bits: int, dtype: str = "bfloat16", **options: Any) -> Path:
    """As most are shared: quantized from half precision."""
    return quantize(store_as(make_tiny_model(folder), dtype), bits, **options)


@pytest.fixture(scope="module")
def dense_run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """An adapter that fits any tiny model, however its weights are stored. Do not write into it."""
    return trained(tmp_path_factory.mktemp("dense"), tiny_model)


def weights_of(folder: Path) -> dict[str, mx.array]:
    found = mx.load(str(folder / "model.safetensors"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(("bits", "dtype"), [(4, "float32"), (4, "float16"), (2, "bfloat16")])
def test_few_bits_that_say_something_else_are_not_kept(tmp_path: Path, bits: int, dtype: str, kind: str) -> None:
    run = trained(tmp_path, quantized(tmp_path / "base", bits, dtype), adapter=kind)
    listener = Recorder()
    check = fuse(FuseConfig(run=run), listener).check
    assert check is not None
    assert (check.way, check.dtype, check.passed) == ("dequantized", dtype, True)
    assert check.refused is not None
    limit = TOLERANCES[dtype]
    assert check.agreement.kl <= limit.kl / 10
    refused = check.refused
    assert refused.kl > limit.kl or abs(refused.loss - refused.loss_reference) > limit.loss
    assert refused.loss_reference == check.agreement.loss_reference
    assert any(f"KL {refused.kl:.2g}" in line and "14 layers" in line for line in listener.said)
    assert read_run(run).fusing == check


def test_only_the_changed_layers_are_dequantized(tmp_path: Path) -> None:
    base = quantized(tmp_path / "base", 4, "float16")
    run = trained(tmp_path, base)
    fuse(FuseConfig(run=run))
    before, after = weights_of(base), weights_of(run / "fused")
    for name in ADAPTED:
        assert after[f"{name}.weight"].dtype == mx.float16
        assert after[f"{name}.weight"].size == 8 * before[f"{name}.weight"].size
        assert f"{name}.scales" not in after
    others = {name for name in before if name.rpartition(".")[0] not in ADAPTED}
    assert {name for name in after if name.rpartition(".")[0] not in ADAPTED} == others
    for name in others:
        assert mx.array_equal(after[name], before[name]), name
    description = json.loads((run / "fused" / "config.json").read_text(encoding="utf-8"))
    expected = {"group_size": 32, "bits": 4, "mode": "affine", **dict.fromkeys(ADAPTED, False)}
    assert description["quantization"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
def test_mlx_lm_loads_what_is_partly_quantized(tmp_path: Path, dense_run: Path, mode: str) -> None:
    """Every way to quantize; what mlx-lm makes of the folder says what it makes of base and adapter."""
    base = quantized(tmp_path / "base", 4, "float32", mode=mode)
    (tmp_path / "out").mkdir()
    fused = fuse_into(base, dense_run, tmp_path / "out", dequantize=True)
    assert (fused.layers, fused.quantized) == (14, 14)
    shutil.copy(base / "tokenizer.json", tmp_path / "out")
    shutil.copy(base / "tokenizer_config.json", tmp_path / "out")
    model, tokenizer = load(str(tmp_path / "out"))
    kinds = {name: type(module).__name__ for name, module in model.named_modules()}
    assert {kinds[name] for name in ADAPTED} == {"Linear"}
    assert kinds["model.layers.1.mlp.up_proj"] == "QuantizedLinear"
    assert kinds["model.embed_tokens"] == "QuantizedEmbedding"
    assert isinstance(generate(model, tokenizer, "def add", max_tokens=4), str)
    probe = make_probe(base, None)
    observe_folder(base, dense_run, probe, tmp_path / "reference")
    observe_folder(tmp_path / "out", None, probe, tmp_path / "found")
    found = agreement(probe, Observation.load(tmp_path / "reference"), Observation.load(tmp_path / "found"))
    assert found.kl <= TOLERANCES[fused.dtype].kl / 10


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
def test_quantized_again_it_is_of_the_same_kind(tmp_path: Path, dense_run: Path, mode: str) -> None:
    base = quantized(tmp_path / "base", 4, mode=mode)
    (tmp_path / "out").mkdir()
    assert fuse_into(base, dense_run, tmp_path / "out") == fusing.Fused(14, 14, "bfloat16")
    before, after = weights_of(base), weights_of(tmp_path / "out")
    assert {n: (v.shape, v.dtype) for n, v in before.items()} == {n: (v.shape, v.dtype) for n, v in after.items()}


@pytest.mark.slow
def test_the_price_of_quantizing_again_is_measured_and_paid_where_asked_for(tmp_path: Path) -> None:
    run = trained(tmp_path, quantized(tmp_path / "base", 4, "float16"))
    listener = Recorder()
    check = fuse(FuseConfig(run=run, quantized_base="requantize"), listener).check
    assert check is not None
    assert (check.way, check.passed, check.refused) == ("requantized", False, None)
    assert check.agreement.kl > check.tolerance_kl
    assert any(f"KL {check.agreement.kl:.2g}" in line for line in listener.said)
    result = CliRunner().invoke(main, ["fuse", str(run), "--quantized-base", "requantize"])
    assert result.exit_code == 0
    assert "does not quite say" in result.stdout


@pytest.mark.slow
def test_the_way_can_be_chosen_from_the_start(tmp_path: Path) -> None:
    run = trained(tmp_path, quantized(tmp_path / "base", 4, "float16"))
    automatic = fuse(FuseConfig(run=run))
    content = {path.name: path.read_bytes() for path in (run / "fused").glob("*.safetensors")}
    chosen = fuse(FuseConfig(run=run, quantized_base="dequantize"))
    assert automatic.check is not None and chosen.check is not None
    assert chosen.check.refused is None
    assert chosen.check.agreement == automatic.check.agreement
    assert {path.name: path.read_bytes() for path in (run / "fused").glob("*.safetensors")} == content


def test_eight_bits_of_a_small_change_stay_quantized(tmp_path: Path) -> None:
    base = quantized(tmp_path / "base", 8)
    run = trained(tmp_path, base)
    record = fuse(FuseConfig(run=run))
    assert record.check is not None
    assert (record.check.way, record.check.passed, record.check.refused) == ("requantized", True, None)
    assert record.bytes == (base / "model.safetensors").stat().st_size


@pytest.mark.slow
@pytest.mark.parametrize("way", ["auto", "dequantize", "requantize"])
def test_a_corrupt_layer_of_a_quantized_base_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Not by `requantize`, which is told to keep what it gets; but a model of no numbers is never kept."""
    run = trained(tmp_path, quantized(tmp_path / "base", 4))
    real = fusing._fuse

    def wrong(name: str, module: Any, *, dequantize: bool) -> Any:
        fused = real(name, module, dequantize=dequantize)
        values = fused.scales if "scales" in fused else fused.weight
        values[3] = math.nan if way == "requantize" else -values[3]
        return fused

    monkeypatch.setattr(fusing, "_fuse", wrong)
    with pytest.raises(ModelError, match="no numbers" if way == "requantize" else "does not say"):
        fuse(FuseConfig(run=run, quantized_base=way))
    assert not (run / "fused").exists()
    assert left_behind(run) == []
    assert read_run(run).fusing is None


@pytest.mark.slow
@pytest.mark.parametrize("way", ["auto", "dequantize", "requantize"])
def test_a_base_that_is_not_quantized_goes_one_way(tmp_path: Path, tiny_model: Path, way: str) -> None:
    run = trained(tmp_path, tiny_model)
    check = fuse(FuseConfig(run=run, quantized_base=way)).check
    assert check is not None
    assert (check.way, check.passed) == ("plain", True)
    description = json.loads((run / "fused" / "config.json").read_text(encoding="utf-8"))
    assert "quantization" not in description


# Memory.


@pytest.mark.slow
@pytest.mark.parametrize("base", ["float32", "bfloat16", "4 bits", "4 bits, dequantized"])
def test_memory_is_the_models_and_one_layers(tmp_path: Path, base: str) -> None:
    """All layers adapted, none of them small beside the rest: what is not let go of at once would show."""
    folder = make_tiny_model(tmp_path / "base", layers=8, hidden=256)
    if base != "float32":
        store_as(folder, "bfloat16")
    if base.startswith("4"):
        quantize(folder, 4)
    run = tmp_path / "run"
    student(folder, layers="all").save_adapter(run)
    (tmp_path / "out").mkdir()
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    fuse_into(folder, run, tmp_path / "out", dequantize="dequantized" in base)
    peak = mx.get_peak_memory() - before
    model = max(file.stat().st_size for file in (tmp_path / "out" / "model.safetensors", folder / "model.safetensors"))
    adapter = RunFolder(run).adapter.stat().st_size
    # Of a quantized base, a layer as it is formed: dense.
    values = sum(value.size for name, value in random_weights(read_config(folder)).items() if ".layers.0." in name)
    layer = values * (4 if base == "float32" else 2)
    assert peak <= model + adapter + layer
    assert peak >= 0.5 * model
    assert mx.get_active_memory() <= before + 0.01 * model
