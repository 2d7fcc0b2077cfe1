"""Several processes that train one adapter, launched by `mlx.launch` over its ring on the loopback interface."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_distill.config import TrainConfig
from mlx_distill.layout import RunFolder
from mlx_distill.runs import read_run
from mlx_distill.training.run import train
from tests.training.runs import ROOT, AtStep, command, environment, make_data, metrics, outcome, settings

LAUNCHER = Path(sys.executable).with_name("mlx.launch")

#: The word in which no process is to hang, in seconds; a launch takes about five.
PATIENCE = 120


@dataclass
class Launch:
    """A launch of two processes, each of which notes its number in the folder."""

    process: subprocess.Popen[str]
    folder: Path

    def pid(self, rank: int) -> int:
        return int((self.folder / f"pid-{rank}").read_text(encoding="ascii"))

    def finish(self) -> tuple[int, str, str]:
        try:
            out, err = self.process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            pytest.fail(f"the launch hangs: {self.abandon()}")
        for rank in range(2):
            with pytest.raises(ProcessLookupError):
                os.kill(self.pid(rank), 0)
        return self.process.returncode, out, err

    def abandon(self) -> str:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return "".join(self.process.communicate())

    def wait_for(self, path: Path, *, lines: int = 1) -> None:
        """Until a file has so many lines."""
        end = time.monotonic() + PATIENCE
        while not path.is_file() or path.read_bytes().count(b"\n") < lines:
            if self.process.poll() is not None or time.monotonic() > end:
                pytest.fail(f"{path} never came: {self.abandon()}")
            time.sleep(0.01)


def free_ports() -> int:
    """The first of two ports that are free now."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first, suppress(OSError):
            port = int(first.getsockname()[1])
            with socket.create_server(("127.0.0.1", port + 1)):
                return port


def launch(config: TrainConfig, folder: Path, *, data: str | None = None) -> Launch:
    """Start two processes.

    Args:
        data: Where each takes its rows from, as the shell has it; as the configuration says, if not given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("pid-*"):
        old.unlink()
    words = [shlex.quote(word) for word in command(config)]
    if data is not None:
        words[words.index("--data") + 1] = data
    script = f"echo $$ > {shlex.quote(str(folder))}/pid-$MLX_RANK; exec {' '.join(words)}"
    line = [LAUNCHER, "-n", "2", "--starting-port", str(free_ports()), "--", "/bin/sh", "-c", script]
    process = subprocess.Popen(
        line,
        cwd=ROOT,
        # The launcher reads it all the time, and a file at its end would keep it busy.
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    )
    return Launch(process, folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> TrainConfig:
    """Ten rows by three: the last batch of an epoch has one row, and nothing for the other process."""
    data = make_data(tmp_path_factory.mktemp("parallel") / "data")
    return settings(data, tiny_model, Path("unset"), report_to=None)


def in_folder(config: TrainConfig, run: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**config.model_dump(), "run": run, **changes})


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("taught", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_two_processes_learn_what_one_does(base: TrainConfig, teacher: Path, tmp_path: Path, taught: bool) -> None:
    """Taught, also on answers that each process's students write."""
    on_the_way = {"distill": "reverse-kl", "teacher_online": f"mlx:{teacher}", "on_policy": 0.5, "on_policy_tokens": 12}
    changes = on_the_way if taught else {}
    alone, both = (in_folder(base, tmp_path / name, **changes) for name in ("alone", "both"))
    train(alone)
    code, out, err = launch(both, tmp_path / "launch").finish()
    assert code == 0, err
    # One of them writes, and one of them speaks.
    assert files(alone.run) == files(both.run)
    assert out.count('"valid_loss"') == 1
    assert err.count("epoch 2: validation loss") == 1
    for one, two in zip(metrics(alone.run), metrics(both.run), strict=True):
        for name in ("loss", "grad_norm", "divergence"):
            assert (one.pop(name, 0) or 0) == pytest.approx(two.pop(name, 0) or 0, rel=1e-5)
        # What this process took, of times that nobody repeats.
        for row in (one, two):
            assert (row.pop("writing_seconds", None) is None) == (row.pop("scoring_seconds", None) is None)
        assert one == two
    adapters = [load_file(RunFolder(config.run).adapter) for config in (alone, both)]
    for name, value in adapters[0].items():
        np.testing.assert_allclose(adapters[1][name], value, rtol=1e-3, atol=1e-5)
    assert '"processes": 2' in RunFolder(both.run).record.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("dies", [0, 1])
def test_a_death_ends_all_and_the_run_resumes_to_the_bit(base: TrainConfig, tmp_path: Path, dies: int) -> None:
    """With dropout: each process has a random state of its own, and both are in the checkpoint."""
    whole = in_folder(base, tmp_path / "whole", dropout=0.2, checkpoint_every=1)
    assert launch(whole, tmp_path / "launch").finish()[0] == 0
    cut = in_folder(whole, tmp_path / "cut")
    going = launch(cut, tmp_path / "launch")
    going.wait_for(RunFolder(cut.run).metrics, lines=4)
    os.kill(going.pid(dies), signal.SIGKILL)
    code, _, err = going.finish()
    assert code != 0 or "exited with code" in err
    assert f"The process of rank {dies} has ended without a word" in err
    assert "the same command goes on" in err
    assert "Traceback" not in err, err
    code, _, err = launch(cut, tmp_path / "launch").finish()
    assert code == 0, err
    assert "Going on from step" in err
    assert outcome(cut.run) == outcome(whole.run)


def test_an_interruption_of_one_saves_and_ends_all(base: TrainConfig, tmp_path: Path) -> None:
    config = in_folder(base, tmp_path / "run", epochs=40, checkpoint_every=1000)
    going = launch(config, tmp_path / "launch")
    going.wait_for(RunFolder(config.run).metrics, lines=3)
    os.kill(going.pid(1), signal.SIGINT)
    _, _, err = going.finish()
    assert "Interrupted. The last checkpoint stands" in err
    assert "Traceback" not in err, err
    assert list(RunFolder(config.run).checkpoints.glob("step-*"))
    # One process goes on with what two have begun.
    short = in_folder(config, config.run)
    before = len(metrics(config.run))
    assert train(short).processes == 1
    assert len(metrics(config.run)) > before


@pytest.mark.slow
def test_two_finish_what_one_began_and_lost_the_adapter_of(base: TrainConfig, tmp_path: Path) -> None:
    """Each has it from the checkpoint."""
    config = in_folder(base, tmp_path / "run", checkpoint_every=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, AtStep(6, lambda: signal.raise_signal(signal.SIGINT)))
    RunFolder(config.run).adapter.unlink()
    alone = in_folder(config, tmp_path / "alone", finish=True)
    shutil.copytree(config.run, alone.run)
    expected = train(alone)
    code, _, err = launch(in_folder(config, config.run, finish=True), tmp_path / "launch").finish()
    assert code == 0, err
    assert "Ends at step 6 of 8." in err
    record = read_run(config.run)
    assert (record.best_step, record.steps, record.cut_short) == (expected.best_step, 6, True)
    assert record.test_loss == pytest.approx(expected.test_loss, rel=1e-5)


def test_other_rows_on_another_machine_are_refused(base: TrainConfig, tmp_path: Path) -> None:
    make_data(tmp_path / "data-0")
    make_data(tmp_path / "data-1", train=11)
    config = in_folder(base, tmp_path / "run")
    code, _, err = launch(config, tmp_path / "launch", data=f"{shlex.quote(str(tmp_path))}/data-$MLX_RANK").finish()
    assert code != 0 or "exited with code 1" in err
    assert "The data set is not the same on all machines" in err
    assert "Traceback" not in err, err
    assert not RunFolder(config.run).record.exists()


@pytest.mark.slow
def test_what_rank_0_cannot_begin_ends_all(base: TrainConfig, tmp_path: Path) -> None:
    config = in_folder(base, tmp_path / "run")
    config.run.mkdir()
    RunFolder(config.run).adapter.write_bytes(b"somebody's")
    _, _, err = launch(config, tmp_path / "launch").finish()
    assert "holds an adapter that no run.json describes" in err
    assert "Traceback" not in err, err
    assert RunFolder(config.run).adapter.read_bytes() == b"somebody's"
