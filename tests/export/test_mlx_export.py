"""The fused model for mlx-lm, as it is and quantized."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load
from safetensors.numpy import load_file

from mlx_distill.backends.mlx.converting import write_dense, write_quantized
from mlx_distill.errors import ModelError
from mlx_distill.export.run import export
from tests.export.exporting import asked, fused, quantize
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.slow

TOKENS = mx.array([[5, 17, 300, 42, 8, 250, 99, 3]])


def test_it_is_the_fused_model(tmp_path: Path, tiny_model: Path) -> None:
    run = fused(tmp_path, tiny_model)
    record = export(asked(run, "mlx"))
    assert record.agreement is not None
    assert (record.agreement.largest_difference, record.agreement.greedy_agreement) == (0, 1)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_it_loads_and_its_price_is_told(tmp_path: Path, tiny_model: Path, bits: int) -> None:
    run = fused(tmp_path, tiny_model)
    record = export(asked(run, "mlx", quantize=str(bits)))
    out = run / "export" / "mlx"
    assert json.loads((out / "config.json").read_text(encoding="utf-8"))["quantization"]["bits"] == bits
    assert record.agreement is not None and record.limit is None
    assert 0 < record.agreement.kl < {4: 0.5, 8: 0.005}[bits]
    assert record.bytes < (run / "fused" / "model.safetensors").stat().st_size
    model, _ = load(str(out))
    assert model(TOKENS).shape == (1, 8, 384)


@pytest.mark.parametrize("bits", [4, 8])
def test_dense_weights_are_what_the_codes_stand_for(tmp_path: Path, bits: int) -> None:
    model = quantize(make_tiny_model(tmp_path / "model"), bits)
    write_dense(model, tmp_path / "dense")
    packed = mx.load(str(model / "model.safetensors"))
    found = load_file(tmp_path / "dense" / "model.safetensors")
    names = {name.removesuffix(".scales") for name in packed if name.endswith(".scales")}
    assert len(names) == 4 * 7 + 1
    for name in names:
        parts = [packed[f"{name}.{part}"] for part in ("weight", "scales", "biases")]
        np.testing.assert_array_equal(found[f"{name}.weight"], mx.dequantize(*parts, group_size=32, bits=bits))
    assert not any(name.endswith((".scales", ".biases")) for name in found)


def test_bits_that_are_there_already_stay(tmp_path: Path) -> None:
    model = quantize(make_tiny_model(tmp_path / "model"), 4)
    write_quantized(model, tmp_path / "same", 4)
    before, after = mx.load(str(model / "model.safetensors")), mx.load(str(tmp_path / "same" / "model.safetensors"))
    assert before.keys() == after.keys()
    assert all(mx.array_equal(before[name], after[name]) for name in before)
    write_quantized(model, tmp_path / "other", 8)
    config = json.loads((tmp_path / "other" / "config.json").read_text(encoding="utf-8"))
    assert (config["quantization"]["bits"], config["quantization"]["group_size"]) == (8, 64)


def test_a_model_that_has_no_groups_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="divides into groups"):
        write_quantized(make_tiny_model(tmp_path / "model", hidden=16), tmp_path / "out", 4)
