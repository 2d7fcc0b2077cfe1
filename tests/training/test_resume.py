"""A run that was interrupted anywhere and started again ends as one that never was: the same bytes, the same rows."""

from __future__ import annotations

import json
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.config import TrainConfig
from mlx_distill.errors import FolderError
from mlx_distill.layout import RunFolder
from mlx_distill.training.run import train
from tests.training.faults import PowerCut, Writes, cut_until_done
from tests.training.runs import AtStep, Recorder, contents, make_data, metrics, outcome, settings, start

#: Interruptions of each kind, over processes that are started again until their run is finished.
KILLS, FEW = 30, 8

#: Of two runs side by side. Without dropout gradients are written out on a CPU: another way through the layers.
DROPOUTS = (0.1, 0.0)

STEPS = 8  # 10 rows in batches of 3, two epochs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("resume") / "data")


@pytest.fixture(scope="module")
def base(data: Path, tiny_model: Path) -> TrainConfig:
    """With dropout, so that the random state counts."""
    return settings(data, tiny_model, Path("unset"), dropout=0.1)


def in_folder(config: TrainConfig, run: Path, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**config.model_dump(), "run": run, **changes})


@pytest.fixture(scope="module")
def whole(base: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ...]:
    """What a run that was never interrupted leaves."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(in_folder(base, run))
    return outcome(run)


# Ctrl-C and SIGTERM, in this process, after every single step


@pytest.mark.parametrize(("number", "every"), [(signal.SIGINT, 1), (signal.SIGTERM, 3), (signal.SIGINT, 100)])
def test_an_interruption_after_any_step_is_made_good(
    base: TrainConfig, whole: tuple[Any, ...], tmp_path: Path, number: signal.Signals, every: int
) -> None:
    for step in range(1, STEPS + 1):
        config = in_folder(base, tmp_path / f"run{step}", checkpoint_every=every)
        watcher = AtStep(step, lambda: signal.raise_signal(number))
        with pytest.raises(KeyboardInterrupt):
            train(config, watcher)
        assert watcher.steps == step
        resumed = AtStep(-1, None)
        train(config, resumed)
        if step < STEPS:
            assert f"Going on from step {step} of {STEPS}." in resumed.said
        assert resumed.steps == STEPS - step  # nothing that was trained is trained again
        assert outcome(config.run) == whole


def test_an_interruption_at_every_step_is_made_good(base: TrainConfig, whole: tuple[Any, ...], tmp_path: Path) -> None:
    config = in_folder(base, tmp_path / "run")
    for _ in range(STEPS):
        with pytest.raises(KeyboardInterrupt):
            train(config, AtStep(1, lambda: signal.raise_signal(signal.SIGINT)))
    train(config)
    assert outcome(config.run) == whole


def test_the_second_ctrl_c_stops_at_once(base: TrainConfig, whole: tuple[Any, ...], tmp_path: Path) -> None:
    config = in_folder(base, tmp_path / "run", checkpoint_every=100)

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config, AtStep(2, twice))
    assert not list(RunFolder(config.run).checkpoints.glob("*"))
    train(config)
    assert outcome(config.run) == whole


def test_the_handlers_are_put_back(base: TrainConfig, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        train(in_folder(base, tmp_path / "run"), AtStep(2, lambda: signal.raise_signal(signal.SIGINT)))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_run_in_a_thread_goes_without_signals(base: TrainConfig, whole: tuple[Any, ...], tmp_path: Path) -> None:
    config = in_folder(base, tmp_path / "run")
    thread = threading.Thread(target=train, args=(config,))
    thread.start()
    thread.join()
    assert outcome(config.run) == whole


# The power goes, in this process, at durable writes


def test_a_cut_at_every_third_write_is_made_good(base: TrainConfig, tmp_path: Path, writes: Writes) -> None:
    short = in_folder(base, tmp_path / "whole", epochs=1)
    writes.mend()
    train(short)
    count = writes.count
    # run.json twice, the best adapter and its configuration twice, two checkpoints, eight rows of metrics.
    assert count > 30
    expected = outcome(short.run)
    for at in range(0, count, 3):
        config = in_folder(short, tmp_path / f"run{at}")
        writes.fail_after(at)
        with pytest.raises(PowerCut):
            train(config)
        writes.mend()
        train(config)
        assert outcome(config.run) == expected, f"cut at write {at}"


def test_cuts_one_after_another_are_made_good(
    base: TrainConfig, whole: tuple[Any, ...], tmp_path: Path, writes: Writes
) -> None:
    generator = random.Random(5)
    config = in_folder(base, tmp_path / "run", checkpoint_every=1, keep_checkpoints=1)
    assert cut_until_done(lambda: train(config), writes, lambda: generator.randrange(2, 32)) >= 5
    assert outcome(config.run) == whole


# What a crash leaves on the disk


@pytest.fixture
def interrupted(base: TrainConfig, tmp_path: Path) -> TrainConfig:
    """A run that stopped after its sixth of eight steps, with checkpoints of steps 4 and 6."""
    config = in_folder(base, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(config, AtStep(6, lambda: signal.raise_signal(signal.SIGINT)))
    return config


@pytest.mark.parametrize("damage", [lambda c: c[:-9], lambda c: b"", lambda c: c[:-1] + bytes([c[-1] ^ 4])])
def test_a_damaged_newest_checkpoint_costs_its_steps_only(
    interrupted: TrainConfig, whole: tuple[Any, ...], damage: Callable[[bytes], bytes]
) -> None:
    newest = sorted(RunFolder(interrupted.run).checkpoints.iterdir())[-1]
    newest.write_bytes(damage(newest.read_bytes()))
    recorder = Recorder()
    train(interrupted, recorder)
    assert any(f"{newest} is damaged" in line for line in recorder.said)
    assert any("Going on from step 4 of 8." in line for line in recorder.said)
    assert outcome(interrupted.run) == whole


@pytest.mark.parametrize("tail", [b'{"kind": "step", "st', b"\x00" * 40, b'{"kind": "st\xc3'])
def test_a_torn_last_row_of_metrics_is_dropped(interrupted: TrainConfig, whole: tuple[Any, ...], tail: bytes) -> None:
    with RunFolder(interrupted.run).metrics.open("ab") as file:
        file.write(tail)
    train(interrupted)
    assert outcome(interrupted.run) == whole


def test_an_adapter_newer_than_the_checkpoint_is_written_over(interrupted: TrainConfig, whole: tuple[Any, ...]) -> None:
    RunFolder(interrupted.run).adapter.write_bytes(b"half")
    train(interrupted)
    assert outcome(interrupted.run) == whole


def test_another_pace_of_checkpoints_goes_on_with_the_same_run(
    interrupted: TrainConfig, whole: tuple[Any, ...]
) -> None:
    train(in_folder(interrupted, interrupted.run, checkpoint_every=1, keep_checkpoints=5))
    assert outcome(interrupted.run) == whole


@pytest.mark.parametrize("place", ["off", "memory", "disk"])
def test_where_rows_are_kept_may_change_on_the_way(
    interrupted: TrainConfig, whole: tuple[Any, ...], place: str
) -> None:
    """And is as the setting is now, not as it was planned when the run began."""
    record = train(in_folder(interrupted, interrupted.run, prefix_cache=place))
    assert record.plan is not None
    assert record.plan.prefix_cache == (None if place == "off" else place)
    adapter, rows, facts = outcome(interrupted.run)
    assert facts["config"].pop("prefix_cache") == place
    assert (adapter, rows) == whole[:2]


@pytest.mark.parametrize("change", [{"micro_batch_size": 1}, {"gradient_checkpointing": "on"}])
def test_what_saves_memory_may_change_on_the_way(base: TrainConfig, tmp_path: Path, change: dict[str, Any]) -> None:
    """As it must, if there was not enough: the same but for rounding, from the step where it was."""
    # Dropout draws once a micro-batch.
    whole, config = (in_folder(base, tmp_path / name, dropout=0.0) for name in ("whole", "run"))
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(config, AtStep(6, lambda: signal.raise_signal(signal.SIGINT)))
    before = metrics(config.run)
    resumed = AtStep(-1, None)
    record = train(in_folder(config, config.run, **change), resumed)
    assert "Going on from step 6 of 8." in resumed.said
    assert record.plan is not None
    assert (record.plan.micro_batch_size, record.plan.checkpointing) == (
        change.get("micro_batch_size", 3),
        "gradient_checkpointing" in change,
    )
    rows = metrics(config.run)
    assert rows[: len(before)] == before
    for ours, theirs in zip(rows, metrics(whole.run), strict=True):
        assert ours.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-4)
        assert ours.pop("grad_norm", 0) == pytest.approx(theirs.pop("grad_norm", 0), rel=1e-3)
        assert ours == theirs


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_a_run_does_not_go_on_with_other_data(
    interrupted: TrainConfig, whole: tuple[Any, ...], tmp_path: Path, split: str
) -> None:
    """Refused before anything of it is touched; with the rows it had, it goes on."""
    before = contents(interrupted.run)
    data = shutil.copytree(interrupted.data, tmp_path / "data")
    with (data / f"{split}.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(FolderError, match="Different: the data set"):
        train(in_folder(interrupted, interrupted.run, data=data))
    assert contents(interrupted.run) == before
    train(interrupted)
    assert outcome(interrupted.run) == whole


# Real processes, killed at random moments


def interrupt_until_finished(config: TrainConfig, number: signal.Signals, count: int, seed: int) -> tuple[int, int]:
    """Start the command, and end it after a random time, until it has been ended `count` times and is finished.

    Returns:
        How often it was ended, and how often that was in the midst of training.
    """
    generator = random.Random(seed)
    ended = in_training = 0
    run = attempt = 0
    while True:
        here = in_folder(config, config.run / f"run{run}")
        child = start(here)
        if ended < count:
            wait_for_training(here, child, generator, at_any_moment=attempt % 4 == 3)
            child.send_signal(number)
        attempt += 1
        _, errors = child.communicate(timeout=120)
        steps = len(list(RunFolder(here.run).checkpoints.glob("*"))) if RunFolder(here.run).checkpoints.exists() else 0
        if child.returncode == 0:
            run += 1
            if ended >= count:
                return ended, in_training
            continue
        ended += 1
        in_training += steps > 0
        assert child.returncode in (-number, 130, 1), errors
        finished = RunFolder(here.run).record.exists() and read_status(here.run) == "finished"
        if number != signal.SIGKILL and "Training" in errors and not finished:
            assert child.returncode == 130, errors
            assert "Traceback" not in errors
            assert "the same command goes on" in errors


def read_status(run: Path) -> str:
    return str(json.loads(RunFolder(run).record.read_text(encoding="utf-8"))["status"])


def wait_for_training(config: TrainConfig, child: Any, generator: random.Random, *, at_any_moment: bool) -> None:
    """Until the run has written some more rows, and then for a random time; or for a random time alone."""
    if at_any_moment:
        time.sleep(generator.random() * 2.5)
        return
    path, deadline = RunFolder(config.run).metrics, time.monotonic() + 60

    def rows() -> int:
        return path.read_bytes().count(b"\n") if path.exists() else 0

    # The first three are of the first validation and two steps, and between these two there is a checkpoint.
    wanted = rows() + generator.randint(3, 6)
    while child.poll() is None and time.monotonic() < deadline and rows() < wanted:
        time.sleep(0.002)
    time.sleep(generator.random() * 0.05)


@pytest.mark.parametrize(
    ("number", "count"),
    [
        (signal.SIGKILL, FEW),
        pytest.param(signal.SIGKILL, KILLS, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, FEW, marks=pytest.mark.slow),
    ],
)
def test_processes_ended_at_random_moments_are_made_good(
    base: TrainConfig, tmp_path: Path, number: signal.Signals, count: int
) -> None:
    """Two at a time, each with a run that is started again and again; all that is finished is as if never ended."""
    given = [
        in_folder(base, tmp_path / f"worker{worker}", checkpoint_every=1, dropout=dropout)
        for worker, dropout in enumerate(DROPOUTS)
    ]

    def never_ended(config: TrainConfig) -> tuple[Any, ...]:
        whole = in_folder(config, tmp_path / f"whole-{config.run.name}")
        child = start(whole)
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors
        return outcome(whole.run)

    with ThreadPoolExecutor(len(given)) as pool:
        expected = list(pool.map(never_ended, given))
        counts = list(
            pool.map(
                lambda worker: interrupt_until_finished(given[worker], number, count // len(given), seed=worker),
                range(len(given)),
            )
        )
    assert expected[0] != expected[1]
    assert sum(ended for ended, _ in counts) >= count
    assert sum(in_training for _, in_training in counts) >= count // 4
    finished = [
        (run, outcome_of) for one, outcome_of in zip(given, expected, strict=True) for run in one.run.glob("run*")
    ]
    assert len(finished) >= 2
    for run, outcome_of in finished:
        assert outcome(run) == outcome_of
        assert not [path for path in run.rglob(".*") if path.name != ".lock"]
