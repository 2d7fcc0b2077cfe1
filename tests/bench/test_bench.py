"""`mlx-distill bench` on a tiny model, with both backends for real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.bench import run as running
from mlx_distill.bench.processes import run_task
from mlx_distill.bench.records import BenchRecord, Task, Turn
from mlx_distill.bench.run import bench
from mlx_distill.config import BenchConfig
from mlx_distill.errors import ConfigError, InputError, TrainingError
from mlx_distill.layout import BenchFolder
from tests.training.runs import ROOT, Recorder, environment, make_data


def small(model: Path, out: Path, **changes: Any) -> BenchConfig:
    values = {"model": str(model), "out": out, "rows": 6, "batch_size": 3, "epochs": 2, "repeats": 1, "layers": 2}
    return BenchConfig.model_validate({"data": make_data(out.parent / "data"), "quick": True, **values, **changes})


def test_both_backends_are_compared_then_timed(tiny_model: Path, tmp_path: Path) -> None:
    config = small(tiny_model, tmp_path / "out")
    record = bench(config, watcher := Recorder(), command="mlx-distill bench")
    assert record.parity is not None
    assert record.parity.backends == ["mlx", "torch"]
    assert record.parity.largest <= 1e-4
    assert any("agree" in line for line in watcher.said)
    assert [turn.backend for turn in record.turns] == ["torch", "mlx"]
    for figures in record.figures:
        assert figures.failure is None
        assert figures.tokens_per_second is not None
        assert figures.first_step is not None
        assert figures.first_step.median > 0.1
    mlx, torch = (next(t.timing for t in record.turns if t.backend == name) for name in ("mlx", "torch"))
    assert mlx is not None
    assert torch is not None
    # The warming step was undone, and the batches are the same: so are all losses.
    assert torch.losses == pytest.approx(mlx.losses, rel=1e-4)
    assert [epoch.tokens for epoch in mlx.epochs] == [epoch.tokens for epoch in torch.epochs] == [record.tokens] * 2
    files = BenchFolder(config.out)
    assert BenchRecord.model_validate_json(files.file("json").read_text(encoding="utf-8")) == record
    assert files.file("png").read_bytes().startswith(b"\x89PNG")
    assert "torch" in files.file("md").read_text(encoding="utf-8")
    assert files.file("html").read_text(encoding="utf-8").startswith("<!doctype html>")


@pytest.mark.slow
def test_a_backend_that_fails_is_a_row_that_says_so(tiny_model: Path, tmp_path: Path) -> None:
    record = bench(small(tiny_model, tmp_path / "out", device="cuda"))
    mlx, torch = record.figures
    assert mlx.tokens_per_second is not None
    assert torch.failure is not None
    assert "device = cuda" in torch.failure
    assert record.parity is None
    assert "failed: device = cuda" in BenchFolder(tmp_path / "out").file("md").read_text(encoding="utf-8")


def test_where_all_fail_there_is_no_bench(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="No backend could be timed"):
        bench(small(tmp_path / "no-such-model", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_different_computations_are_refused(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them has another learning rate."""
    real = running._training

    def other(config: BenchConfig, backend: str, folder: Path, run: Path) -> dict[str, Any]:
        return {**real(config, backend, folder, run), **({"learning_rate": 1e-2} if backend == "torch" else {})}

    monkeypatch.setattr(running, "_training", other)
    with pytest.raises(TrainingError, match="mlx and torch do not compute the same"):
        bench(small(tiny_model, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"backends": "mlx,jax"}, ConfigError, "there is no jax"),
        ({"backends": " , "}, ConfigError, "none is named"),
        ({"peers": True, "rows": 7}, ConfigError, "multiple of the batch size"),
        ({"data": Path("/nowhere")}, InputError, "no such file"),
    ],
)
def test_what_cannot_be_timed_is_refused_at_once(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        bench(small(tiny_model, tmp_path / "out", **changes))


def test_a_worker_that_is_killed_or_hangs_is_a_failure(tiny_model: Path, tmp_path: Path) -> None:
    hung = run_task(_task(tiny_model, tmp_path), 1, tmp_path / "hung", seconds=0.01)
    assert hung.failure is not None
    assert "not done after" in hung.failure
    assert not _workers(tmp_path)


def _task(model: Path, tmp_path: Path) -> Task:
    config = small(model, tmp_path / "out")
    settings = running._training(config, "mlx", tmp_path, tmp_path / "run")
    return Task(config={**settings, "data": str(config.data)})


def _workers(folder: Path) -> list[int]:
    """Processes whose command line names the folder."""
    lines = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,args="], capture_output=True, text=True, check=True).stdout
    found = [line.split(None, 1) for line in lines.splitlines() if "mlx_distill.bench.worker" in line]
    return [int(pid) for pid, line in found if str(folder) in line]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_end_of_the_bench_ends_its_processes(tiny_model: Path, tmp_path: Path, number: signal.Signals) -> None:
    make_data(tmp_path / "data")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    line = [sys.executable, "-m", "mlx_distill", "bench", "--model", str(tiny_model), "--data", str(tmp_path / "data")]
    process = subprocess.Popen(
        [*line, "--out", str(tmp_path / "out"), "--epochs", "9999", "--layers", "2"],
        cwd=ROOT,
        env={**environment(), "TMPDIR": str(temporary)},
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + 60
    while not _workers(temporary):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 130)
    while left := _workers(temporary):
        assert time.monotonic() < end, left
        time.sleep(0.05)
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_a_turn_says_what_its_worker_said(tmp_path: Path) -> None:
    turn = run_task(_task(tmp_path / "no-such-model", tmp_path), 1, tmp_path / "files", seconds=60)
    assert turn == Turn(backend="mlx", number=1, failure=turn.failure)
    assert turn.failure is not None
    assert "no-such-model" in turn.failure
