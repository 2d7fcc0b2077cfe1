"""The step `bench`.

Reads: data/NAME/train.jsonl, or the starter answers.
Writes: visuals/bench/{bench.json,bench.md,bench.html,bench.png}.
"""

from __future__ import annotations

import platform
import subprocess
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_distill import layout
from mlx_distill.bench.figures import figures_of, find_parity, in_turn, project, ratios_to
from mlx_distill.bench.page import as_html, as_markdown, headline
from mlx_distill.bench.peers import PEERS
from mlx_distill.bench.processes import run_task
from mlx_distill.bench.records import BenchRecord, Task, Turn
from mlx_distill.bench.rows import write_rows
from mlx_distill.config import BenchConfig
from mlx_distill.doctor.machine import chip
from mlx_distill.doctor.packages import installed
from mlx_distill.errors import ConfigError, TrainingError
from mlx_distill.progress import SILENT, Bar, Progress
from mlx_distill.run_records import MemoryPlan

BACKENDS = ("mlx", "torch")

#: Steps whose losses are compared before anything is timed.
_PARITY_STEPS = 2

#: What the presets change.
_ORIGINAL = {"rows": 104, "epochs": 5, "repeats": 1}
_QUICK = {"rows": 8, "epochs": 2, "repeats": 2, "layers": 4}

_PACKAGES = ("mlx-distill", "mlx", "mlx-lm", "torch", "transformers", "peft", "numpy")


def bench(config: BenchConfig, progress: Progress = SILENT, *, command: str = "mlx-distill bench") -> BenchRecord:
    """Compare the losses of all backends, then time them, turn by turn, each time in a process of its own.

    Args:
        config: What to time.
        progress: Who watches.
        command: What was typed, for the record.

    Returns:
        The record, which is written too. A backend that fails is a row of it that says so.

    Raises:
        ConfigError: A backend that does not exist, or none.
        TrainingError: The backends do not compute the same: there is nothing to compare. Or all of them failed.
    """
    config = _with_preset(config)
    backends = _backends(config)
    if config.peers and config.rows % config.batch_size:
        raise ConfigError(
            f"rows = {config.rows}: with --peers a multiple of the batch size, {config.batch_size}, is needed, as "
            "mlx_lm.lora drops what does not fill a batch.",
            hint=f"--rows {config.rows // config.batch_size * config.batch_size or config.batch_size}",
        )
    with tempfile.TemporaryDirectory(prefix="mlx-distill-bench-") as name:
        folder = Path(name)
        write_rows(folder / "data", config.data, count=config.rows, short=config.quick)
        turns = _take_turns(config, backends, folder, progress)
    timed = [turn for turn in turns if turn.number]
    done = [turn.timing for turn in timed if turn.timing]
    if not done:
        reasons = "; ".join(f"{turn.backend}: {turn.failure}" for turn in turns if turn.failure)
        raise TrainingError(f"No backend could be timed. {reasons}", hint="mlx-distill doctor")
    names = [*backends, *(PEERS if config.peers else ())]
    figures = [figures_of(name, turns) for name in names]
    record = BenchRecord(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        machine=machine(),
        # A folder's path says where on a machine it is, which is nobody's business.
        model=Path(config.model).name if Path(config.model).exists() else config.model,
        rows=config.rows,
        tokens=done[0].epochs[0].tokens,
        epochs=config.epochs,
        settings=config.model_dump(mode="json", exclude={"out", "timeout"}),
        parity=find_parity(turn for turn in turns if not turn.number),
        figures=figures,
        ratios=ratios_to(backends[0], timed),
        projections=project(config.rows, figures),
        turns=timed,
    )
    _write(config.out, record)
    return record


def _write(out: Path, record: BenchRecord) -> None:
    from mlx_distill.report.charts import Bar, bench_bars

    out.mkdir(parents=True, exist_ok=True)
    files = layout.BenchFolder(out)
    layout.write_text(files.file("json"), record.model_dump_json(indent=2, exclude_none=True) + "\n")
    layout.write_text(files.file("md"), as_markdown(record))
    layout.write_text(files.file("html"), as_html(record))
    bars = [
        Bar(one.backend, (speed.median, speed.least, speed.most), one.peak_bytes or 0)
        for one in record.figures
        if (speed := one.tokens_per_second)
    ]
    subtitle = f"LoRA training of {record.model}, {record.rows} rows, {record.epochs} epochs, the same batches"
    foot = f"{record.machine['processor']}, {record.machine['system']}, {record.created[:10]}"
    bench_bars(files.file("png"), bars, title=headline(record), subtitle=subtitle, foot=foot)


def _take_turns(config: BenchConfig, backends: Sequence[str], folder: Path, progress: Progress) -> list[Turn]:
    """Turn 0 compares losses and plans memory, for the others too; a backend that fails there is not tried again."""
    turns: list[Turn] = []
    plans: dict[str, MemoryPlan | None] = {}
    peers = list(PEERS) if config.peers else []
    total = len(backends) + (len(backends) + len(peers)) * config.repeats
    with progress.task("Timing", total=total, unit="runs") as bar:
        for number in range(1 + config.repeats):
            failed = {turn.backend for turn in turns if turn.failure}
            for backend in in_turn([*backends, *peers] if number else backends, number):
                if backend not in failed:
                    plan = plans.get(backend)
                    turns.append(_take_turn(config, backend, number, folder, progress, bar, plan))
            plans |= {turn.backend: turn.timing.plan for turn in turns if turn.timing}
            if number == 0:
                _require_parity(turns, progress)
    return turns


def _take_turn(
    config: BenchConfig,
    backend: str,
    number: int,
    folder: Path,
    progress: Progress,
    bar: Bar,
    plan: MemoryPlan | None,
) -> Turn:
    bar.advance(0, now=f"{backend}, {f'turn {number} of {config.repeats}' if number else 'comparing losses'}")
    place = folder / f"{number}-{backend}"
    peer = backend if backend in PEERS else None
    settings = _training(config, "mlx" if peer else backend, folder, place)
    task = Task(config=settings, peer=peer, plan=plan, steps=None if number else _PARITY_STEPS)
    turn = run_task(task, number, place, seconds=config.timeout)
    if turn.failure:
        progress.say(f"{backend}: {turn.failure}")
    bar.advance(1)
    return turn


def _training(config: BenchConfig, backend: str, folder: Path, run: Path) -> dict[str, Any]:
    """The settings of `train`; nothing random, so that losses can be compared."""
    chosen = config.model_dump(
        mode="json", include={"epochs", "batch_size", "rank", "layers", "max_length", "dtype", "seed"}
    )
    device = config.device if backend == "torch" else "auto"
    own = {"model": config.model, "data": str(folder / "data"), "run": str(run), "dropout": 0.0}
    return {**chosen, **own, "backend": backend, "device": device}


def _require_parity(turns: Sequence[Turn], progress: Progress) -> None:
    parity = find_parity(turns)
    if parity is None:
        return
    if not parity.largest <= parity.limit:
        raise TrainingError(
            f"{' and '.join(parity.backends)} do not compute the same: the losses of {parity.steps} steps on the same "
            f"batches differ by up to {parity.largest:.1e} (rounding explains {parity.limit:.0e}). "
            "To time them would compare two different computations.",
            hint="Try --dtype float32; if they still differ, please report it with this output.",
        )
    progress.say(
        f"Losses of {parity.steps} steps agree: largest relative difference {parity.largest:.1e}, "
        f"of {parity.limit:.0e} that rounding explains."
    )


def _with_preset(config: BenchConfig) -> BenchConfig:
    """What a preset changes, unless the user has."""
    changes = {**(_ORIGINAL if config.preset else {}), **(_QUICK if config.quick else {})}
    return config.model_copy(update={key: v for key, v in changes.items() if key not in config.model_fields_set})


def _backends(config: BenchConfig) -> list[str]:
    names = list(dict.fromkeys(part.strip() for part in config.backends.split(",") if part.strip()))
    unknown = [name for name in names if name not in BACKENDS]
    if unknown or not names:
        raise ConfigError(
            f"backends = {config.backends!r}: {'there is no ' + unknown[0] if unknown else 'none is named'}.",
            hint=f"Choose from {', '.join(BACKENDS)}, separated by commas.",
        )
    return names


def machine() -> dict[str, str]:
    """What a reader must know of the machine to make sense of a figure."""
    found = {"system": _system(), "processor": _processor(), "python": platform.python_version()}
    return found | {name: version for name in _PACKAGES if (version := installed(name))}


def _system() -> str:
    release = platform.mac_ver()[0]
    return f"macOS {release}" if release else f"{platform.system()} {platform.release()}"


def _processor() -> str:
    try:
        return chip()[0].found
    except (OSError, subprocess.SubprocessError):
        # What took an hour is not thrown away for a name.
        return platform.machine()
