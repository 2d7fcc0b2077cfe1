"""One process of a bench: a student of one backend, the steps, and the clock.

    python -m mlx_distill.bench.worker TASK.json RESULT.json

The batches and their order are those of `train`, by the same functions. Before the clock starts, one step is taken on a
batch of made-up tokens, as wide as the widest, and undone.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import numpy as np

from mlx_distill import layout
from mlx_distill.backends.base import ALONE, Student
from mlx_distill.backends.memory import resident_peak_bytes
from mlx_distill.batches import Batch, padded_width, plan_epoch
from mlx_distill.bench.energy import joules_so_far
from mlx_distill.bench.peers import measure_peer
from mlx_distill.bench.records import Epoch, Task, Timing
from mlx_distill.children import end_with_parent
from mlx_distill.config import TrainConfig
from mlx_distill.dataset import TokenSplit, load_splits
from mlx_distill.errors import MlxDistillError
from mlx_distill.models.resolve import resolve
from mlx_distill.models.tokenizer import leave_out_torch, load_tokenizer
from mlx_distill.run_records import MemoryPlan
from mlx_distill.training.planning import Tokens, micro_batches, plan_memory, rows_at_once
from mlx_distill.training.run import student_maker
from mlx_distill.training.schedule import learning_rate


def measure(task: Task, started: float) -> Timing:
    """Do a task.

    Args:
        started: When the process was, by `time.time`.
    """
    config = TrainConfig.model_validate(task.config)
    make_student = student_maker(config)
    model = Path(resolve(config.model).path)
    split = load_splits(config.data, load_tokenizer(model), max_length=config.max_length)["train"]
    student = make_student(model, config, ALONE)
    tokens = int(split.lengths.sum())
    longest = int(split.lengths.max())
    plan = task.plan or plan_memory(student, config, Tokens(longest, tokens, 0), config.run)
    student.adopt(plan, config.run)
    # What compares losses is not timed.
    first_step = _warm(student, plan, config, longest, started) if task.steps is None else 0.0
    epochs: list[Epoch] = []
    losses: list[float] = []
    before = joules_so_far()
    for number in range(config.epochs):
        epochs.append(_epoch(student, split, config, plan, number, losses, task.steps))
        if task.steps is not None and len(losses) >= task.steps:
            break
    after = joules_so_far()
    return Timing(
        backend=config.backend,
        device=student.device,
        ways=student.ways,
        trainable=student.trainable_parameters,
        first_step_seconds=first_step,
        epochs=epochs,
        losses=losses,
        peak_bytes=resident_peak_bytes(),
        device_bytes=student.peak_memory_bytes(),
        joules=after - before if before is not None and after is not None else None,
        plan=plan,
    )


def _warm(student: Student, plan: MemoryPlan, config: TrainConfig, longest: int, started: float) -> float:
    """Take one step and undo it; when it ended, in seconds since the process started."""
    state = student.state()
    width = padded_width(longest)
    rows = min(rows_at_once(plan, config.batch_size, width), config.batch_size)
    tokens = np.tile(np.arange(width, dtype=np.int32) % 13, (rows, 1))
    mask = np.ones((rows, width), dtype=np.bool_)
    mask[:, 0] = False
    student.step([Batch(tokens, mask, np.full(rows, width, np.int32), np.arange(rows, dtype=np.int32))], 1e-6)
    ended = time.time() - started
    student.restore(state)
    return ended


def _epoch(
    student: Student,
    split: TokenSplit,
    config: TrainConfig,
    plan: MemoryPlan,
    number: int,
    losses: list[float],
    steps: int | None,
) -> Epoch:
    order = plan_epoch(split.lengths, config.batch_size, seed=config.seed, epoch=number)
    total = config.epochs * len(order)
    started = time.perf_counter()
    tokens = 0
    seconds: list[float] = []
    for rows in order:
        if steps is not None and len(losses) >= steps:
            break
        begun = time.perf_counter()
        stats = student.step(micro_batches(plan, split, rows), learning_rate(config, len(losses), total))
        seconds.append(time.perf_counter() - begun)
        tokens += stats.tokens
        losses.append(stats.loss)
    return Epoch(seconds=time.perf_counter() - started, tokens=tokens, step_seconds=seconds)


def main() -> int:
    """Do the task of the first file, and write what was measured into the second."""
    started = float(os.environ.get("MLX_DISTILL_BENCH_STARTED", time.time()))
    task_file, result_file = map(Path, sys.argv[1:])
    end_with_parent()
    try:
        task = layout.read_record(task_file, Task)
        if task.peer is None and task.config["backend"] != "torch":
            leave_out_torch()
        timing = (measure_peer if task.peer else measure)(task, started)
    except MlxDistillError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    layout.write_text(result_file, timing.to_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
