"""Folders of training runs as they lie on the disk, written without any training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_distill import layout
from mlx_distill.run_records import MetricRow

RECORD: dict[str, Any] = {
    "format": 1,
    "identity": "1",
    "status": "finished",
    "created": "2026-11-24T10:00:00+00:00",
    "version": "0.1.0",
    "backend": "mlx",
    "device": "CPU",
    "model": {"spec": "m", "source": "folder", "path": "/m", "name": "Model", "revision": "abcdef0123456789"},
    "config": {
        **{"data": "data/mine", "model": "m", "epochs": 3, "batch_size": 4, "rank": 8, "layers": "all"},
        **{"learning_rate": 2e-4, "grad_clip": None, "rslora": False},
    },
    "splits": {
        "train": {"rows": 10, "tokens": 1000, "target_tokens": 500, "sha256": "a" * 64},
        "valid": {"rows": 2, "tokens": 200, "target_tokens": 100, "sha256": "b" * 64},
    },
    "trainable_parameters": 100,
    "epochs": 3,
    "steps": 9,
    "best_step": 6,
    "first_valid_loss": 2.5,
    "train_loss": 1.5,
    "valid_loss": 1.75,
    "test_loss": 1.9,
    "token_accuracy": 0.5,
    "tokens_per_second": 250.5,
    "peak_memory_bytes": 2 * 10**9,
    "seconds": 12.5,
}


def write(root: Path, **changes: Any) -> Path:
    """A run with its adapter; a change to None takes a field away, one to a dictionary changes single keys of it."""
    record = json.loads(json.dumps(RECORD))
    for key, value in changes.items():
        if value is None:
            del record[key]
        else:
            record[key] = {**record[key], **value} if isinstance(value, dict) else value
    root.mkdir(parents=True)
    folder = layout.RunFolder(root)
    record["config"]["run"] = str(root)
    folder.record.write_text(json.dumps(record), encoding="utf-8")
    if record.get("status") == "finished":
        folder.adapter.touch()
    return root


def row(kind: Any, step: int, seconds: float, loss: float = 2.0, **more: Any) -> str:
    values = {"epoch": step / 3, "token_accuracy": 0.25, "target_tokens": 50, "tokens": 100, **more}
    return MetricRow(kind=kind, step=step, seconds=seconds, loss=loss, **values).to_json() + "\n"


def write_metrics(root: Path, *lines: str | bytes) -> None:
    content = b"".join(line if isinstance(line, bytes) else line.encode() for line in lines)
    layout.RunFolder(root).metrics.write_bytes(content)
