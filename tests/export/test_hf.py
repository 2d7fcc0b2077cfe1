"""The fused model for transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from mlx_distill.agreement import Probe, ProbeRow
from mlx_distill.backends.torch.observing import observe_folder
from mlx_distill.errors import ModelError
from mlx_distill.export.run import export
from tests.export.exporting import asked, fused, quantize
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.slow

PROBE = Probe(rows=(ProbeRow(tokens=(5, 17, 300), positions=(0, 1)),))


def test_transformers_says_what_the_student_says(tmp_path: Path) -> None:
    run = fused(tmp_path, make_tiny_model(tmp_path / "model", tied=False))
    record = export(asked(run, "hf"))
    assert record.agreement is not None
    assert record.agreement.kl < 1e-9
    assert record.agreement.greedy_agreement == 1
    before, after = load_file(run / "fused" / "model.safetensors"), load_file(run / "export/hf/model.safetensors")
    assert {k: v.tobytes() for k, v in before.items()} == {k: v.tobytes() for k, v in after.items()}


@pytest.mark.parametrize("to", ["hf", "gguf"])
def test_quantized_matrices_are_dequantized_on_the_way(tmp_path: Path, to: Any) -> None:
    run = fused(tmp_path, quantize(make_tiny_model(tmp_path / "model"), 8))
    assert "quantization" in json.loads((run / "fused" / "config.json").read_text(encoding="utf-8"))
    record = export(asked(run, to))
    assert record.agreement is not None
    assert record.agreement.kl < 1e-6
    assert not (run / "export" / to / ".work").exists()
    if to == "hf":
        config = json.loads((run / "export" / "hf" / "config.json").read_text(encoding="utf-8"))
        assert not {"quantization", "quantization_config"} & config.keys()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda weights: weights.pop("model.layers.2.mlp.up_proj.weight"), "missing keys"),
        (lambda weights: weights.update(extra=weights["model.norm.weight"]), "unexpected keys"),
    ],
)
def test_what_transformers_would_make_up_is_an_error(tmp_path: Path, change: Any, reason: str) -> None:
    from safetensors.numpy import save_file

    model = make_tiny_model(tmp_path / "model")
    weights = dict(load_file(model / "model.safetensors"))
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=reason):
        observe_folder(model, None, PROBE, tmp_path / "out")
