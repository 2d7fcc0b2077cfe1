"""What tests of exports share: adapters that say something, on tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from mlx_lm.utils import load_model, quantize_model, save_model
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from mlx_distill.backends.mlx.linears import Layers
from mlx_distill.config import ExportConfig, FuseConfig
from mlx_distill.fuse import fuse
from mlx_distill.layout import RunFolder
from mlx_distill.models.resolve import resolve
from mlx_distill.run_records import RunRecord
from mlx_distill.training.run import train
from tests.training.runs import make_data, settings


def trained(folder: Path, model: Path, **changes: Any) -> Path:
    """A finished run whose adapter says something."""
    run = folder / "run"
    train(settings(make_data(folder / "data"), model, run, **{"epochs": 3, "learning_rate": 0.02, **changes}))
    return run


def fused(folder: Path, model: Path, **changes: Any) -> Path:
    """The same, fused."""
    run = trained(folder, model, **changes)
    fuse(FuseConfig(run=run))
    return run


def asked(source: Path, to: str, **changes: Any) -> ExportConfig:
    """An export's configuration."""
    return ExportConfig.model_validate({"source": source, "to": to, **changes})


def adapter(run: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a run's adapter."""
    return dict(load_file(RunFolder(run).adapter))


def description(run: Path) -> dict[str, Any]:
    """A run's `adapter_config.json`."""
    found: dict[str, Any] = json.loads(RunFolder(run).adapter_config.read_text(encoding="utf-8"))
    return found


def quantize(folder: Path, bits: int) -> Path:
    """Quantize a model in place, in groups of 32."""
    model, config = load_model(folder)
    model, config = quantize_model(model, config, group_size=32, bits=bits)
    save_model(folder, model, donate_model=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def left_over(folder: Path) -> list[str]:
    """What lies in a folder and below it, but for locks."""
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != ".lock")


def random_run(
    folder: Path,
    model: Path,
    *,
    rank: int,
    scale: float = 2.0,
    dora: bool = False,
    rslora: bool = False,
    dropout: float = 0.0,
    layers: int = 2,
    keys: list[str] | None = None,
) -> Path:
    """A finished run with random factors, as training would have left it, in milliseconds."""
    found = resolve(str(model))
    everything = Layers(model)
    generator = np.random.default_rng(rank)
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, matrix in everything.matrices.items():
        if matrix.layer >= everything.count - layers and (keys is None or matrix.key in keys):
            tensors[f"{name}.lora_a"] = generator.standard_normal((matrix.inputs, rank)).astype(np.float32)
            tensors[f"{name}.lora_b"] = generator.standard_normal((rank, matrix.outputs)).astype(np.float32)
            if dora:
                tensors[f"{name}.m"] = generator.uniform(0.5, 2, matrix.outputs).astype(np.float32)
    folder.mkdir(parents=True)
    files = RunFolder(folder)
    save_file(tensors, files.adapter, metadata={"format": "mlx"})
    parameters = {"rank": rank, "scale": scale, "dropout": dropout, **({"keys": keys} if keys else {})}
    kind = "dora" if dora else "lora"
    text = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters, "model": str(model)}
    files.adapter_config.write_text(json.dumps(text), encoding="utf-8")
    record = RunRecord(
        identity="1",
        status="finished",
        created="2026-11-24T10:00:00+00:00",
        version="0",
        backend="mlx",
        device="CPU",
        model=found,
        config={"data": "nowhere", "rslora": rslora},
        splits={},
        trainable_parameters=1,
    )
    files.record.write_text(record.to_json(), encoding="utf-8")
    return folder
