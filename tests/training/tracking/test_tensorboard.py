"""TensorBoard's event files hold each step once, whatever interrupts the run."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from mlx_distill import layout
from mlx_distill.config import TrainConfig
from mlx_distill.run_records import RunRecord
from mlx_distill.training import trackers as trackers_module
from mlx_distill.training.run import train
from tests.training.runs import environment, settings
from tests.training.tracking.tracked import STEPS, expected_points, in_folder, stopping, without_speed


def events(path: Path) -> Iterator[Event]:
    """The events of one file, every checksum of which must hold."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        data = content[12 : 12 + length]
        checksums = struct.unpack("<I", content[8:12]) + struct.unpack("<I", content[12 + length : 16 + length])
        assert checksums == (masked_crc32c(content[:8]), masked_crc32c(data))
        yield Event.FromString(data)
        content = content[16 + length :]


def event_files(run: Path) -> list[Path]:
    return sorted(layout.RunFolder(run).tensorboard.iterdir())


def logged(run: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics) of all files, one after the other."""
    return [
        (event.step, {value.tag: value.simple_value for value in event.summary.value})
        for path in event_files(run)
        for event in events(path)
        if any(value.HasField("simple_value") for value in event.summary.value)
    ]


def check_tensorboard(run: Path) -> None:
    """All of `metrics.jsonl` is there, each step once, in its order."""
    points = logged(run)
    assert [step for step, _ in points] == list(range(STEPS + 1))
    expected = expected_points(run)
    for step, values in points:
        assert without_speed(values) == pytest.approx(expected[step], rel=1e-6)  # float32


def test_tensorboard_has_the_run(base: TrainConfig, tmp_path: Path) -> None:
    config = in_folder(base, tmp_path / "run", report_to="tensorboard")
    train(config)
    check_tensorboard(config.run)
    (path,) = event_files(config.run)
    first, restart, *_ = events(path)
    assert first.file_version == "brain.Event:2"
    assert (restart.session_log.status, restart.step) == (restart.session_log.START, 0)
    assert re.fullmatch(r"events\.out\.tfevents\.\d{20}", path.name)  # and no name of the machine
    assert b"learning_rate" in path.read_bytes()


@pytest.mark.parametrize("step", [1, 3, 4, 5, 8])
def test_tensorboard_goes_on_after_an_interruption(base: TrainConfig, tmp_path: Path, step: int) -> None:
    config = in_folder(base, tmp_path / "run", report_to="tensorboard")
    with pytest.raises(KeyboardInterrupt):
        train(config, stopping(step))
    train(config)
    check_tensorboard(config.run)
    second = list(events(event_files(config.run)[1]))
    assert second[1].step == step if step < STEPS else second[1].step >= step


KILLED = """
import os, signal, sys
from pathlib import Path
from mlx_distill.training.run import train
from tests.training.runs import AtStep, settings

data, model, run, step = sys.argv[1:]
train(settings(Path(data), Path(model), Path(run), report_to="tensorboard", checkpoint_every=3),
      AtStep(int(step), lambda: os.kill(os.getpid(), signal.SIGKILL)))
"""


@pytest.mark.slow
def test_tensorboard_goes_on_after_kills(data: Path, tiny_model: Path, tmp_path: Path) -> None:
    config = settings(data, tiny_model, tmp_path / "run", report_to="tensorboard", checkpoint_every=3)
    for step in (5, 2):
        process = subprocess.run(
            [sys.executable, "-c", KILLED, data, tiny_model, config.run, str(step)],
            env={**environment(), "MLX_DISABLE_COMPILE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == -signal.SIGKILL, process.stderr
    train(config)
    check_tensorboard(config.run)


@pytest.fixture(scope="module")
def stopped_file(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, RunRecord]:
    """The event file of a run that was stopped after its sixth step, which has the steps 0 to 5; and its record."""
    config = in_folder(base, tmp_path_factory.mktemp("stopped") / "run", report_to="tensorboard")
    with pytest.raises(KeyboardInterrupt):
        train(config, stopping(6))
    (path,) = event_files(config.run)
    assert [step for step, _ in logged(config.run)] == list(range(6))
    return path.read_bytes(), layout.read_record(layout.RunFolder(config.run).record, RunRecord)


def next_step_after(content: bytes, record: RunRecord, folder: Path) -> int:
    run = layout.RunFolder(folder)
    run.tensorboard.mkdir(parents=True)
    (run.tensorboard / "events.out.tfevents.00000000000000000001").write_bytes(content)
    tracker = trackers_module.TensorBoard(run, record)
    tracker.close(finished=False)
    return tracker.next_step


def test_a_torn_event_file_lacks_its_torn_step_only(stopped_file: tuple[bytes, RunRecord], tmp_path: Path) -> None:
    content, record = stopped_file
    tail = 40
    found = [next_step_after(content[:-cut], record, tmp_path / str(cut)) for cut in range(1, tail)]
    assert set(found) == {5}
    assert next_step_after(content, record, tmp_path / "whole") == 6
    endless = struct.pack("<Q", 2**62)
    endless += struct.pack("<I", masked_crc32c(endless))
    for number, junk in enumerate((b"\x00" * 64, b"\xff" * 64, b"x", os.urandom(100), endless)):
        assert next_step_after(content + junk, record, tmp_path / f"junk{number}") == 6
        assert next_step_after(junk, record, tmp_path / f"only{number}") == 0


@pytest.mark.parametrize("change", [lambda c: c, lambda c: c[:-3]])
def test_tensorboard_itself_reads_each_step_once(
    base: TrainConfig, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = in_folder(base, tmp_path / "run", report_to="tensorboard")
    with pytest.raises(KeyboardInterrupt):
        train(config, stopping(5))
    (path,) = event_files(config.run)
    path.write_bytes(change(path.read_bytes()))
    train(config)
    accumulator = accumulators.EventAccumulator(str(layout.RunFolder(config.run).tensorboard))
    accumulator.Reload()
    scalars = {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }
    assert [step for step, _ in scalars["train/loss"]] == list(range(1, STEPS + 1))
    assert [step for step, _ in scalars["valid/loss"]] == [0, 4, 8]
    assert scalars["test/loss"][0][1] == pytest.approx(expected_points(config.run)[STEPS]["test/loss"], rel=1e-6)
