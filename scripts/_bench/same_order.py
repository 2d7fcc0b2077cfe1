"""The same batches in the same order from the same adapter, through our step and through mlx-lm's; two processes.

    python -m _bench.same_order ours WORKLOAD.json FOLDER       takes the steps, and writes down what it was given
    python -m _bench.same_order mlx-lm WORKLOAD.json FOLDER     takes the same steps again

mlx-lm's side is its own `default_loss`, `nn.value_and_grad` over it and MLX's AdamW, as in its trainer. Its batches
are `(tokens, lengths)`, with each row's answer from `lengths[:, 0]` up to `lengths[:, 1]`. As mlx-lm 0.32.2's trainer
fills the latter in, the loss takes in the first padding token after each row. Here it is filled in as one less, so
that the loss is on the very tokens that ours is on; nothing else is changed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from _bench import workload
from _bench.peer import load_blas
from _bench.workload import WEIGHT_DECAY, Workload

#: Written by ours: an array of tokens and one of answers' bounds a step, the rates, and the adapter before the first.
_BATCHES, _RATES, _INITIAL = "batches.npz", "rates.json", "initial"


def losses_file(folder: Path, who: str) -> Path:
    """Where a side writes its losses, one a step."""
    return folder / f"{who}.losses.json"


def ours(work: Workload, folder: Path) -> list[float]:
    """Take every step of the workload, and save all that the other side needs."""
    import numpy as np

    from _bench.ours import train_config
    from mlx_distill.backends.mlx.student import MlxStudent
    from mlx_distill.batches import make_batch, plan_epoch
    from mlx_distill.dataset import tokenise_split
    from mlx_distill.models.tokenizer import load_tokenizer
    from mlx_distill.training.schedule import learning_rate

    config = train_config(work, folder)
    rows = tokenise_split(work.data / "train.jsonl", load_tokenizer(work.model), max_length=work.max_length).rows
    student = MlxStudent(work.model, config)
    student.save_adapter(folder / _INITIAL)
    arrays, rates, losses = {}, [], []
    for epoch in range(work.epochs):
        for indices in plan_epoch([len(row.tokens) for row in rows], config.batch_size, seed=work.seed, epoch=epoch):
            batch = make_batch(rows, indices)
            rate = learning_rate(config, len(losses), work.epochs * work.steps_per_epoch)
            arrays[f"tokens{len(losses)}"] = batch.tokens
            arrays[f"bounds{len(losses)}"] = np.stack([batch.loss_mask.argmax(axis=1), batch.lengths - 1], axis=1)
            rates.append(rate)
            losses.append(student.step([batch], rate).loss)
    np.savez(folder / _BATCHES, **arrays)
    (folder / _RATES).write_text(json.dumps(rates))
    return losses


def mlx_lm(work: Workload, folder: Path) -> list[float]:
    """Take the same steps with what mlx-lm's trainer is made of."""
    load_blas()
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim
    import numpy as np
    from mlx_lm.tuner.trainer import default_loss
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load

    model, _ = load(str(work.model))
    model.freeze()
    load_adapters(model, str(folder / _INITIAL))
    model.train()
    optimizer = optim.AdamW(0.0, weight_decay=WEIGHT_DECAY, bias_correction=True)
    value_and_grad = nn.value_and_grad(model, default_loss)
    losses = []
    with np.load(folder / _BATCHES) as arrays:
        for at, rate in enumerate(json.loads((folder / _RATES).read_text())):
            batch = mx.array(arrays[f"tokens{at}"]), mx.array(arrays[f"bounds{at}"])
            (loss, targets), gradient = value_and_grad(model, *batch)
            if targets.item() != _answer_tokens(arrays[f"bounds{at}"]):
                raise SystemExit(f"step {at + 1}: mlx-lm's loss is on {targets.item()} tokens")
            optimizer.learning_rate = mx.array(rate)
            optimizer.update(model, gradient)
            mx.eval(loss, model.trainable_parameters(), optimizer.state)
            losses.append(loss.item())
    return losses


def _answer_tokens(bounds) -> int:
    return int((bounds[:, 1] - bounds[:, 0] + 1).sum())


def main() -> None:
    who, work, folder = sys.argv[1:]
    losses = {"ours": ours, "mlx-lm": mlx_lm}[who](workload.load(work), Path(folder))
    losses_file(Path(folder), who).write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
