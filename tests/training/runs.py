"""What tests of training share: a small data set, a configuration, and what must be equal between two runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlx_distill.config import FuseConfig, TrainConfig
from mlx_distill.fuse import fuse
from mlx_distill.layout import RunFolder
from mlx_distill.progress import Bar, Progress
from mlx_distill.training.run import train

ROOT = Path(__file__).resolve().parents[2]

WORDS = ("def add(first, second):", "for item in items:", "return the largest number", "class Node:", "print(value)")


def chat(number: int) -> dict[str, Any]:
    """A row whose length varies with its number."""
    answer = " ".join(WORDS[(number * 3 + at) % len(WORDS)] for at in range(1 + number % 4))
    return {
        "messages": [
            {"role": "user", "content": f"{WORDS[number % len(WORDS)]} {number}"},
            {"role": "assistant", "content": f"{answer}\n{number}"},
        ]
    }


def make_data(folder: Path, *, train: int = 10, valid: int = 3, test: int = 2) -> Path:
    """A data set in mlx-lm's chat layout; a split of no rows has no file."""
    folder.mkdir(parents=True, exist_ok=True)
    first = 0
    for name, count in (("train", train), ("valid", valid), ("test", test)):
        if count:
            rows = "".join(json.dumps(chat(first + at)) + "\n" for at in range(count))
            (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")
        first += count
    return folder


def settings(data: Path, model: Path, run: Path, **changes: Any) -> TrainConfig:
    """Two epochs of a small adapter, in float32, at a learning rate at which a random model learns."""
    values: dict[str, Any] = {
        "data": data,
        "model": str(model),
        "run": run,
        "epochs": 2,
        "batch_size": 3,
        "rank": 4,
        "layers": 2,
        "learning_rate": 5e-3,
        "max_length": 256,
        "checkpoint_every": 2,
        "dtype": "float32",
    }
    return TrainConfig.model_validate({**values, **changes})


def online(data: Path, model: Path, run: Path, teacher: Path, **changes: Any) -> TrainConfig:
    """The same, with a teacher that is asked on the way."""
    values = {"distill": "reverse-kl", "teacher_online": f"mlx:{teacher}", "on_policy_tokens": 12, **changes}
    return settings(data, model, run, **values)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The rows of a run, without the time they took."""
    rows = [json.loads(line) for line in RunFolder(run).metrics.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        assert row.pop("seconds") >= 0
    return rows


def outcome(run: Path) -> tuple[bytes, list[dict[str, Any]], dict[str, Any]]:
    """All of a finished run that must not depend on whether it was interrupted."""
    record = json.loads(RunFolder(run).record.read_text(encoding="utf-8"))
    # The plan says what memory there was.
    for key in ("created", "seconds", "tokens_per_second", "peak_memory_bytes", "plan"):
        record.pop(key)
    for key in ("run", "checkpoint_every", "keep_checkpoints"):
        record["config"].pop(key)
    return RunFolder(run).adapter.read_bytes(), metrics(run), record


def contents(run: Path) -> dict[Path, bytes]:
    """All that a run's folder holds, but for its lock."""
    return {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


class Recorder(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


class AtStep(Recorder):
    """Does something in the middle of training, after a number of steps of this process."""

    def __init__(self, step: int, action: Any) -> None:
        super().__init__()
        self._step, self._action = step, action
        self.steps = 0

    @contextmanager
    def task(self, title: str, total: float | None = None, *, unit: str = "") -> Iterator[Bar]:
        outer = self

        class Counting(Bar):
            def advance(self, amount: float = 1, **fields: str) -> None:
                if "loss" in fields:
                    outer.steps += 1
                    if outer.steps == outer._step:
                        outer._action()

        yield Counting()


def command(config: TrainConfig) -> list[str]:
    """The command line of a training run."""
    flags = []
    for key, value in config.model_dump(mode="json", exclude_none=True).items():
        if value is not False:
            flags += [f"--{key.replace('_', '-')}"] + [str(value)] * (value is not True)
    return [sys.executable, "-m", "mlx_distill", "train", *flags, "--json"]


def environment() -> dict[str, str]:
    """Of a child process: one BLAS thread, as several children share the machine."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def start(config: TrainConfig) -> subprocess.Popen[str]:
    """Start a training run in a process of its own."""
    return subprocess.Popen(
        command(config), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )


def fused_run(folder: Path, model: Path) -> Path:
    """A finished and fused run, named tuned, whose student says something else than its base."""
    run = folder / "tuned"
    train(settings(make_data(folder / "data"), model, run, epochs=3, learning_rate=0.02))
    fuse(FuseConfig(run=run))
    return run
