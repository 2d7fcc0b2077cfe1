"""What tests of fusing share: runs whose adapter says something, and bases whose weights are not float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_model, quantize_model, save_model

from mlx_distill.training.run import train
from tests.training.runs import make_data, settings


def trained(folder: Path, model: Path, **changes: Any) -> Path:
    """A finished run whose adapter says something."""
    data = make_data(folder / "data")
    run = folder / "run"
    train(settings(data, model, run, **{"epochs": 3, "learning_rate": 0.02, **changes}))
    return run


def store_as(folder: Path, dtype: str) -> Path:
    """Store a model's weights in "float16" or "bfloat16"."""
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    halved = {name: value.astype(getattr(mx, dtype)) for name, value in weights.items()}
    mx.eval(halved)
    mx.save_safetensors(str(folder / "model.safetensors"), halved, metadata={"format": "pt"})
    return folder


def quantize(folder: Path, bits: int, *, mode: str = "affine") -> Path:
    """Quantize a model as `mlx_lm.convert -q` does."""
    model, description = load_model(folder)
    group_size = {"nvfp4": 16}.get(mode, 32)
    model, description = quantize_model(model, description, group_size=group_size, bits=bits, mode=mode)
    save_model(folder, model, donate_model=True)
    (folder / "config.json").write_text(json.dumps(description), encoding="utf-8")
    return folder


def fused_files(folder: Path) -> dict[str, bytes]:
    """All that a fused model holds; nothing where there is none."""
    return {path.name: path.read_bytes() for path in folder.glob("*")}


def left_behind(folder: Path) -> list[str]:
    """Hidden files in a folder, but for the lock of a run."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".") and path.name != ".lock")
