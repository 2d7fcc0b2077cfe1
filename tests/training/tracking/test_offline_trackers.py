"""Trackio and Weights & Biases, where they are installed; both without a network."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mlx_distill import layout
from mlx_distill.config import TrainConfig
from mlx_distill.run_records import RunRecord
from mlx_distill.training.run import train
from mlx_distill.training.trackers import tracking_id
from tests.training.tracking.tracked import STEPS, expected_points, in_folder, outcome_of, stopping, without_speed

SECRET = "sk-secret-that-no-tracker-may-see"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a secret, from which the run lies apart."""
    for name in [name for name in os.environ if name.startswith(("WANDB_", "TRACKIO_"))]:
        monkeypatch.delenv(name)
    home = tmp_path / "home-of-somebody"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("ANTHROPIC_API_KEY", SECRET)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.chdir(home)
    return tmp_path


def check_private(*paths: Path) -> None:
    files = [file for path in paths for file in path.rglob("*") if file.is_file()]
    assert any(b"learning_rate" in file.read_bytes() for file in files)
    for file in files:
        content = file.read_bytes()
        for private in (SECRET, "home-of-somebody", sys.executable):
            assert private.encode() not in content, (file, private)


def run_twice_stopped(config: TrainConfig) -> None:
    for step in (3, 2):
        with pytest.raises(KeyboardInterrupt):
            train(config, stopping(step))
    train(config)


def test_trackio_has_each_step_once(base: TrainConfig, whole: tuple[Any, ...], offline: Path) -> None:
    trackio = pytest.importorskip("trackio")
    storage = pytest.importorskip("trackio.sqlite_storage")
    utils = pytest.importorskip("trackio.utils")
    with pytest.MonkeyPatch.context() as patch:
        for module in (storage, utils):
            patch.setattr(module, "TRACKIO_DIR", offline / "trackio")
        config = in_folder(base, offline / "run", report_to="trackio")
        run_twice_stopped(config)
        assert outcome_of(config.run) == whole
        (found,) = trackio.Api().runs("mlx-distill")
        rows = storage.SQLiteStorage.get_logs("mlx-distill", found.name)
    assert found.name.startswith("run-")
    assert found.config["learning_rate"] == base.learning_rate
    points = [
        (row["step"], {key: value for key, value in row.items() if key not in ("step", "timestamp")}) for row in rows
    ]
    assert [step for step, _ in points] == list(range(STEPS + 1))
    assert {step: without_speed(values) for step, values in points} == expected_points(config.run)
    check_private(offline / "trackio")


def test_wandb_has_the_run_in_each_folder_of_its_files(
    base: TrainConfig, whole: tuple[Any, ...], offline: Path
) -> None:
    """Offline it cannot know what earlier processes gave it, so that the last of its folders has all."""
    pytest.importorskip("wandb")
    config = in_folder(base, offline / "run", report_to="wandb")
    run_twice_stopped(config)
    assert outcome_of(config.run) == whole
    # Names end with a number where two were made in one second.
    folders = sorted((config.run / "wandb").glob("offline-run-*"), key=lambda path: path.stat().st_ctime_ns)
    record = layout.read_record(layout.RunFolder(config.run).record, RunRecord)
    identity = tracking_id(layout.RunFolder(config.run), record)
    assert [identity in folder.name for folder in folders] == [True] * 3
    (store,) = folders[-1].glob("run-*.wandb")
    points = list(wandb_history(store))
    assert [step for step, _ in points] == list(range(STEPS + 1))
    assert {step: without_speed(values) for step, values in points} == expected_points(config.run)
    for folder in folders:
        for path in folder.rglob("debug*"):  # which stay here
            path.unlink()
        check_private(folder)


def wandb_history(path: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """The rows of metrics in a file for `wandb sync`: records of LevelDB's log, none of which is in parts here."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()[7:]
    assert len(content) < 32_768
    while content:
        length, whole = struct.unpack("<HB", content[4:7])
        assert whole == 1
        found = Record.FromString(content[7 : 7 + length])
        if found.WhichOneof("record_type") == "history":
            values = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in found.history.item}
            yield found.history.step.num, {key: value for key, value in values.items() if not key.startswith("_")}
        content = content[7 + length :]
