"""A process of its own: the validation loss of every contender's adapters, all computed by the same code.

    python -m _bench.validate WORKLOAD.json ADAPTERS.json OUT.json

ADAPTERS.json maps a name to the files of its adapters, one an epoch, in the format of whoever wrote them; OUT.json
maps it to their losses. The name "" stands for the base model, which has no adapter.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from _bench import workload
from _bench.ours import train_config
from _bench.workload import BATCH_SIZE, Workload
from mlx_distill.backends.base import NO_TOKENS
from mlx_distill.backends.mlx.student import MlxStudent
from mlx_distill.batches import in_order
from mlx_distill.dataset import tokenise_split
from mlx_distill.layout import RunFolder
from mlx_distill.models.tokenizer import load_tokenizer

Weights = dict[str, NDArray[np.generic]]

#: What PEFT, and our checkpoints, put before a parameter's name.
_PEFT, _OURS = "base_model.model.", "adapter."


def read_adapter(path: Path) -> Weights:
    """An adapter under mlx-lm's names and shapes, whether mlx-lm, PEFT or a checkpoint of ours holds it."""
    weights: Weights = load_file(path)
    if any(name.startswith(_PEFT) for name in weights):
        return {_from_peft(name): np.ascontiguousarray(value.T) for name, value in weights.items()}
    if any(name.startswith(_OURS) for name in weights):
        return {name.removeprefix(_OURS): value for name, value in weights.items() if name.startswith(_OURS)}
    return weights


def _from_peft(name: str) -> str:
    """`base_model.model.X.lora_A.weight` → `X.lora_a`; the matrices are each other's transposes."""
    return name.removeprefix(_PEFT).removesuffix(".weight").replace("lora_A", "lora_a").replace("lora_B", "lora_b")


def validate(work: Workload, adapters: dict[str, list[str]]) -> dict[str, list[float]]:
    """Mean loss in nats over the answers of the validation rows, for every adapter."""
    rows = tokenise_split(work.valid, load_tokenizer(work.model), max_length=work.max_length).rows
    student = MlxStudent(work.model, train_config(work, work.folder))
    shapes = {
        name.removeprefix(_OURS): value.shape
        for name, value in student.state().arrays.items()
        if name.startswith(_OURS)
    }

    def loss() -> float:
        return sum((student.evaluate(batch) for batch in in_order(rows, BATCH_SIZE)), NO_TOKENS).loss

    losses = {"": [loss()]}
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(Path(name))
        for contender, files in adapters.items():
            losses[contender] = []
            for file in files:
                weights = read_adapter(Path(file))
                # One that lacks a matrix would be completed by what was loaded before it.
                if {name: value.shape for name, value in weights.items()} != shapes:
                    raise SystemExit(f"{file} is not an adapter of the layers that all were told to train.")
                save_file(weights, folder.adapter)
                student.load_adapter(folder.root)
                losses[contender].append(loss())
    return losses


def main() -> None:
    work, adapters, out = sys.argv[1:]
    losses = validate(workload.load(work), json.loads(Path(adapters).read_text()))
    Path(out).write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
