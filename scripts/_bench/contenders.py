"""Run a contender in a fresh process, and read what it did."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from _bench import environment, ours
from _bench.processes import Outcome, run
from _bench.workload import Trained, Workload, load_trained

SCRIPTS = Path(__file__).resolve().parent.parent
ROOT = SCRIPTS.parent

#: In the order in which they take their turns: what another is held against comes before it.
CONTENDERS = ("mlx-lm", "ours", "ours-limited", "trl")

#: Of the peak memory of `mlx_lm.lora`, what `ours-limited` may take unless told otherwise.
LIMIT_SHARE = 1 / 3

#: Steps of a short trial of `mlx_lm.lora`. The first may wait for a compiler.
_TRIAL_STEPS = 3


@dataclass(frozen=True)
class Options:
    """How the contenders are run.

    Attributes:
        compiled: Whether `mlx_lm.lora` runs with `mx.compile`.
        allocator: Whether it gets our setting of the allocator.
        sampling: TRL's order of rows.
        environment: Folder of TRL's environment.
    """

    compiled: bool
    allocator: bool
    sampling: str
    environment: Path


@dataclass(frozen=True)
class Result:
    """One run of a contender.

    Attributes:
        failure: Why there is nothing to show; None if there is.
    """

    contender: str
    turn: int
    outcome: Outcome | None = None
    trained: Trained | None = None
    failure: str | None = None


def run_contender(
    contender: str, turn: int, work: Workload, options: Options, *, memory_limit: str | None = None
) -> Result:
    """Train with a contender. What goes wrong with it is in the result.

    Args:
        memory_limit: Of `ours-limited`.
    """
    folder = work.folder / f"{contender}-{turn}"
    folder.mkdir()
    try:
        command, changes = _command(contender, work, folder, options, memory_limit)
    except environment.EnvironmentFailedError as error:
        return Result(contender, turn, failure=str(error))
    outcome = run(command, log=work.folder / f"{folder.name}.log", environment=changes)
    if outcome.failure is not None:
        return Result(contender, turn, outcome, failure=outcome.failure)
    try:
        trained = ours.read_run(work, folder) if contender.startswith("ours") else load_trained(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Result(contender, turn, outcome, failure=f"its result cannot be read: {type(error).__name__}: {error}")
    if len(trained.steps) != work.epochs * work.steps_per_epoch:
        return Result(contender, turn, outcome, failure=f"it took {len(trained.steps)} steps")
    return Result(contender, turn, outcome, trained)


def our_environment() -> dict[str, str | None]:
    """Of a process that imports this project."""
    return {"PYTHONPATH": f"{SCRIPTS}{os.pathsep}{ROOT}", "PYTHONSAFEPATH": "1"}


def _command(
    contender: str, work: Workload, folder: Path, options: Options, memory_limit: str | None
) -> tuple[list[str | Path], dict[str, str | None]]:
    if contender == "mlx-lm":
        return _mlx_lm(work, folder, compiled=options.compiled, allocator=options.allocator)
    if contender == "trl":
        python = environment.python_of(options.environment)
        command = [python, "-m", "_bench.trl_sft", work.save(), folder, f"--sampling={options.sampling}"]
        return command, {"PYTHONPATH": str(SCRIPTS), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    limit = [f"--memory-limit={memory_limit}"] if contender == "ours-limited" else []
    return [sys.executable, "-m", "mlx_distill", "train", *ours.flags(work, folder), *limit], our_environment()


def _mlx_lm(
    work: Workload, folder: Path, *, compiled: bool, allocator: bool, trial: bool = False
) -> tuple[list[str | Path], dict[str, str | None]]:
    shortly = ["--data", work.probe, "--iterations", str(_TRIAL_STEPS)] if trial else []
    command = [
        *(sys.executable, "-m", "_bench.mlx_lm_lora", work.save(), folder),
        *shortly,
        *(["--allocator"] if allocator else []),
    ]
    return command, {**our_environment(), "MLX_DISABLE_COMPILE": None if compiled else "1"}


def try_compile(work: Workload, *, allocator: bool) -> tuple[bool, dict[str, float | str]]:
    """Find out by a short trial whether `mlx_lm.lora` is faster with `mx.compile` or without.

    The trial also leaves its compiled kernels on the disk, where MLX keeps them, so that a run after it need not wait
    for a compiler.

    Returns:
        Which, and of both the seconds of the fastest step after the first, or why it failed.
    """
    found: dict[str, float | str] = {}
    for compiled in (False, True):
        name = "compiled" if compiled else "not compiled"
        folder = work.folder / f"trial-{name.replace(' ', '-')}"
        folder.mkdir()
        command, changes = _mlx_lm(work, folder, compiled=compiled, allocator=allocator, trial=True)
        failure = run(command, log=work.folder / f"{folder.name}.log", environment=changes).failure
        found[name] = failure or min(step.seconds for step in load_trained(folder).steps[1:])
    without, with_it = found["not compiled"], found["compiled"]
    return isinstance(with_it, float) and (isinstance(without, str) or with_it < without), found
