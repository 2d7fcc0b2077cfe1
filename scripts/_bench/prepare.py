"""A process of its own: makes the rows and the float32 student that all contenders read, and writes down the facts.

python -m _bench.prepare WORKLOAD.json MODEL     rows, student, facts
python -m _bench.prepare peak                    speed of a matrix product in GFLOP/s, on standard output
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import mlx_distill.backends.mlx as _  # noqa: F401 - prepares MLX, before MLX is imported

import mlx.core as mx  # isort: skip

from _bench import workload
from _bench.rows import write_rows
from _bench.workload import BATCH_SIZE, Workload
from mlx_distill import __version__
from mlx_distill.backends.mlx.device import describe_device, measure_matmul
from mlx_distill.dataset import TokenSplit, tokenise_split
from mlx_distill.errors import MlxDistillError
from mlx_distill.models.resolve import resolve
from mlx_distill.models.tokenizer import load_tokenizer


def prepare(work: Workload, model: str) -> None:
    """Write the student, the rows of each split, those of a short trial, and the facts."""
    source = resolve(model)
    _write_float32(Path(source.path), work.model)
    tokenizer = load_tokenizer(work.model)
    for path, split, count in ((work.data / "train.jsonl", "train", work.rows), (work.valid, "valid", work.valid_rows)):
        write_rows(
            path, tokenizer, split=split, count=count, shortest=work.shortest, longest=work.longest, seed=work.seed
        )
    train = tokenise_split(work.data / "train.jsonl", tokenizer, max_length=work.max_length)
    valid = tokenise_split(work.valid, tokenizer, max_length=work.max_length)
    _write_shortest(train, work.probe / "train.jsonl")
    facts = {
        "model": source.name,
        "train": [(len(row.tokens), row.target_tokens) for row in train.rows],
        "valid": [(len(row.tokens), row.target_tokens) for row in valid.rows],
        "device": describe_device(),
        "versions": {
            "mlx-distill": __version__,
            **{name: version(name) for name in ("mlx", "mlx-lm", "transformers", "numpy")},
        },
    }
    work.facts.write_text(json.dumps(facts))


def _write_float32(source: Path, folder: Path) -> None:
    """Copy a model's folder, its weights made float32: what a contender gets is not left to its own conversion."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json"))
    weights: dict[str, mx.array] = {}
    for path in sorted(source.glob("*.safetensors")):
        loaded = mx.load(str(path))
        assert isinstance(loaded, dict)
        weights |= loaded
    config = json.loads((source / "config.json").read_text())
    if "quantization" in config:
        raise SystemExit(f"{source} is quantized; the three contenders have no quantization in common.")
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        {name: value.astype(mx.float32) for name, value in weights.items()},
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}, indent=2))


def _write_shortest(train: TokenSplit, path: Path) -> None:
    """The rows of one batch, the shortest there are."""
    lines = train.path.read_text(encoding="utf-8").splitlines(keepends=True)
    order = sorted(range(len(lines)), key=lambda at: len(train.rows[at].tokens))
    path.parent.mkdir()
    path.write_text("".join(lines[at] for at in order[:BATCH_SIZE]), encoding="utf-8")


def main() -> None:
    if sys.argv[1] == "peak":
        sys.stdout.write(f"{measure_matmul(seconds=2.0)}\n")
        return
    try:
        prepare(workload.load(sys.argv[1]), sys.argv[2])
    except MlxDistillError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
