"""Trackers mirror a run step by step, whatever interrupts it, and can neither stop it nor change it."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mlx_distill import layout
from mlx_distill.config import TrainConfig
from mlx_distill.errors import ConfigError, DependencyError, TrainingError
from mlx_distill.run_records import MetricRow, RunRecord
from mlx_distill.training import tracking
from mlx_distill.training.run import train
from mlx_distill.training.trackers import KINDS, described, open_trackers, tracker_names, tracking_id
from mlx_distill.training.tracking import Point, Trackers, values_of
from tests.training.runs import ROOT, Recorder, make_data, settings
from tests.training.tracking.tracked import STEPS, expected_points, in_folder, outcome_of, stopping, without_speed


class Mirror:
    """Keeps what it is given, and stands where it stood when it is opened again."""

    PACKAGE = "json"
    HINT = ""
    kept: ClassVar[dict[str, list[tuple[int, dict[str, float]]]]]
    ends: ClassVar[list[bool]]

    def __init__(self, folder: layout.RunFolder, record: RunRecord) -> None:
        self._points = self.kept.setdefault(tracking_id(folder, record), [])
        self.next_step = self._points[-1][0] + 1 if self._points else 0

    def log(self, point: Point) -> None:
        self._points.append((point.step, dict(point.values)))

    def close(self, *, finished: bool) -> None:
        self.ends.append(finished)


class Failing(Mirror):
    """Fails at the n-th point that it is given."""

    at = 1
    error: BaseException = OSError("the network is gone")
    taken = 0

    def log(self, point: Point) -> None:
        self.taken += 1
        if self.taken == self.at:
            raise self.error
        super().log(point)


class Hanging(Mirror):
    """Never comes back."""

    def log(self, point: Point) -> None:
        threading.Event().wait()


@pytest.fixture(autouse=True)
def kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mirror, "kept", {}, raising=False)
    monkeypatch.setattr(Mirror, "ends", [], raising=False)
    for name, kind in (("mirror", Mirror), ("failing", Failing), ("hanging", Hanging)):
        monkeypatch.setitem(KINDS, name, kind)  # type: ignore[misc]


# What a tracker is given


def rows_of(*kinds_and_steps: tuple[Any, int]) -> list[MetricRow]:
    return [
        MetricRow(
            kind=kind,
            step=step,
            epoch=step / 4,
            loss=number + 0.5,
            token_accuracy=0.25,
            target_tokens=5,
            tokens=100,
            seconds=2.0 * number,
            **({"learning_rate": 0.1, "grad_norm": 3.0} if kind == "step" else {}),
        )
        for number, (kind, step) in enumerate(kinds_and_steps)
    ]


def opened(folder: Path, record: RunRecord) -> Trackers:
    config = TrainConfig(data=folder, run=folder, report_to="mirror")
    return open_trackers(config, layout.RunFolder(folder), record)


@pytest.fixture
def record(base: TrainConfig, tmp_path: Path) -> RunRecord:
    """Of a run that was trained."""
    run = tmp_path / "recorded"
    train(in_folder(base, run))
    return layout.read_record(layout.RunFolder(run).record, RunRecord)


ROWS = rows_of(("valid", 0), ("step", 1), ("step", 2), ("train", 2), ("valid", 2), ("step", 3), ("test", 3))


def test_a_divergence_and_a_students_own_answers_have_curves_of_their_own() -> None:
    of = {"step": 3, "epoch": 0.5, "token_accuracy": 0.25, "target_tokens": 4, "tokens": 9, "seconds": 2.0}
    row = MetricRow(kind="step", loss=1.5, divergence=0.75, **of)
    assert values_of(row, 0.0) == {"train/loss": 1.5, "train/token_accuracy": 0.25, "train/divergence": 0.75}
    own = row.model_copy(update={"on_policy": True})
    assert values_of(own, 0.0) == {
        "train/own_loss": 1.5,
        "train/own_token_accuracy": 0.25,
        "train/own_divergence": 0.75,
    }
    assert values_of(row.model_copy(update={"kind": "valid"}), 0.0)["valid/divergence"] == 0.75


def test_all_rows_of_a_step_are_one_point(tmp_path: Path, record: RunRecord) -> None:
    with opened(tmp_path, record) as one:
        for row in ROWS:
            one.observe(row)
    step = {"train/token_accuracy": 0.25, "train/learning_rate": 0.1, "train/grad_norm": 3.0}
    assert list(Mirror.kept.values()) == [
        [
            (0, {"valid/loss": 0.5, "valid/token_accuracy": 0.25}),
            (1, {"train/loss": 1.5, "train/tokens_per_second": 50.0, **step}),
            (
                2,
                {
                    **{"train/loss": 2.5, "train/tokens_per_second": 50.0, **step},
                    **{"train/epoch_loss": 3.5, "train/epoch_token_accuracy": 0.25},
                    **{"valid/loss": 4.5, "valid/token_accuracy": 0.25},
                },
            ),
            (
                3,
                {
                    **{"train/loss": 5.5, "train/tokens_per_second": 50.0, **step},
                    **{"test/loss": 6.5, "test/token_accuracy": 0.25},
                },
            ),
        ]
    ]
    assert Mirror.ends == [True]


@pytest.mark.parametrize(
    ("error", "last"), [(None, 3), (TrainingError("not finite"), 3), (KeyboardInterrupt(), 2), (OSError(), 2)]
)
def test_a_step_goes_out_when_nothing_more_can_come_of_it(
    tmp_path: Path, record: RunRecord, error: BaseException | None, last: int
) -> None:
    """What was interrupted is sent whole once the run has gone on."""
    with contextlib.suppress(BaseException), opened(tmp_path, record) as one:
        for row in ROWS:
            one.observe(row)
        if error is not None:
            raise error
    (points,) = Mirror.kept.values()
    assert [step for step, _ in points] == list(range(last + 1))
    assert Mirror.ends == [error is None]


def test_no_tracker_is_nothing_at_all(tmp_path: Path, record: RunRecord) -> None:
    threads = threading.active_count()
    with open_trackers(TrainConfig(data=tmp_path, run=tmp_path), layout.RunFolder(tmp_path), record) as none:
        for row in ROWS:
            none.observe(row)
        assert threading.active_count() == threads


def test_a_run_is_told_without_its_machine(base: TrainConfig, record: RunRecord) -> None:
    told = described(record)
    assert told["learning_rate"] == base.learning_rate
    assert (told["train_rows"], told["valid_rows"], told["test_rows"]) == (10, 3, 2)
    assert {key for key, value in told.items() if "/" in str(value)} <= {"data", "model", "run"}
    assert all(isinstance(value, (str, int, float, bool)) for value in told.values())


def test_a_run_made_anew_is_another(tmp_path: Path, record: RunRecord) -> None:
    folder = layout.RunFolder(tmp_path / "run")
    same = tracking_id(folder, record)
    assert same == tracking_id(folder, record.model_copy(update={"status": "running", "steps": 0, "seconds": None}))
    others = {
        tracking_id(folder, record.model_copy(update={"created": "2026-01-01T00:00:00+00:00"})),
        tracking_id(folder, record.model_copy(update={"identity": "other"})),
        tracking_id(layout.RunFolder(tmp_path / "other"), record),
    }
    assert len({same, *others}) == 4


# Before the training


@pytest.mark.parametrize(
    ("report_to", "told"),
    [
        ("wandbb", "'wandbb': there is no tracker 'wandbb' (did you mean wandb?)."),
        ("mirror,Tensorboard", "there is no tracker 'Tensorboard' (did you mean tensorboard?)."),
        ("none", "there is no tracker 'none'."),
        ("wandb,foo", "there is no tracker 'foo'."),
        ("mirror,", "there is no tracker ''."),
        ("", "there is no tracker ''."),
    ],
)
def test_an_unknown_tracker_is_told_before_anything_else(tmp_path: Path, report_to: str, told: str) -> None:
    """Neither the model, which is none, is looked for, nor a folder made."""
    config = settings(make_data(tmp_path / "data"), tmp_path / "no-model", tmp_path / "run", report_to=report_to)
    with pytest.raises(ConfigError) as caught:
        train(config)
    assert told in caught.value.message
    assert caught.value.hint is not None
    assert "tensorboard, trackio, wandb" in caught.value.hint
    assert not config.run.exists()


def test_a_tracker_that_is_not_installed_is_told_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of its name, as trackers leave their own in the current one, does not pass for it."""
    monkeypatch.setattr(Mirror, "PACKAGE", "tracker_of_which_there_is_none")
    config = settings(make_data(tmp_path / "data"), tmp_path / "no-model", tmp_path / "run", report_to="mirror")
    for _ in range(2):
        with pytest.raises(DependencyError) as caught:
            train(config)
        assert caught.value.message == "tracker_of_which_there_is_none is not installed."
        assert caught.value.hint == "Install it:  pip install 'mlx-distill[mirror]'"
        assert not config.run.exists()
        (tmp_path / "tracker_of_which_there_is_none").mkdir(exist_ok=True)
        monkeypatch.syspath_prepend(tmp_path)


def test_every_tracker_has_an_extra() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for name in ("tensorboard", "trackio", "wandb"):
        assert any(line.startswith(KINDS[name].PACKAGE) for line in extras[name])


def test_names_are_separated_by_commas() -> None:
    assert tracker_names(None) == ()
    assert tracker_names(" tensorboard, mirror,tensorboard") == ("tensorboard", "mirror")


def test_a_tracker_that_does_not_start_is_told_before_the_model_is_loaded(
    base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that had started are ended."""

    class Offline(Mirror):
        HINT = "Log in."

        def __init__(self, folder: layout.RunFolder, record: RunRecord) -> None:
            raise ConnectionError("no route to host\nmore")

    monkeypatch.setitem(KINDS, "offline", Offline)  # type: ignore[misc]
    config = in_folder(base, tmp_path / "run", report_to="mirror,offline")
    threads = threading.active_count()
    with pytest.raises(TrainingError) as caught:
        train(config)
    assert str(caught.value) == "offline could not be started: no route to host.\n  Log in."
    assert Mirror.ends == [False]
    assert threading.active_count() == threads
    assert not layout.RunFolder(config.run).record.exists()


# While it trains


def test_trackers_change_nothing_of_a_run(base: TrainConfig, whole: tuple[Any, ...], tmp_path: Path) -> None:
    config = in_folder(base, tmp_path / "run", report_to="tensorboard,mirror")
    train(config)
    assert outcome_of(config.run) == whole
    (points,) = Mirror.kept.values()
    assert {step: without_speed(values) for step, values in points} == expected_points(config.run)
    assert all(values["train/tokens_per_second"] > 0 for step, values in points if step)
    assert Mirror.ends == [True]


@pytest.mark.parametrize("at", [1, 4, STEPS + 1])
@pytest.mark.parametrize(
    "error",
    [OSError("the network is gone"), SystemExit(3), KeyboardInterrupt(), ZeroDivisionError(), Exception("a\nb")],
)
def test_a_tracker_that_fails_is_named_once_and_training_goes_on(
    base: TrainConfig,
    whole: tuple[Any, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    error: BaseException,
) -> None:
    monkeypatch.setattr(Failing, "at", at)
    monkeypatch.setattr(Failing, "error", error)
    config = in_folder(base, tmp_path / "run", report_to="failing,mirror")
    recorder = Recorder()
    train(config, recorder)
    assert outcome_of(config.run) == whole
    said = [line for line in recorder.said if "failing" in line]
    assert len(said) == 1
    assert said[0].startswith("failing failed and gets no more metrics: ")
    assert Mirror.ends.count(True) == 1  # the other one's
    assert Mirror.ends.count(False) == 1


def test_a_tracker_that_fails_to_end_is_named(
    base: TrainConfig, whole: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Mirror, *, finished: bool) -> None:
        raise RuntimeError("could not upload")

    monkeypatch.setattr(Mirror, "close", fail)
    config = in_folder(base, tmp_path / "run", report_to="mirror")
    recorder = Recorder()
    train(config, recorder)
    assert outcome_of(config.run) == whole
    assert recorder.said[-1] == (
        "mirror failed and gets no more metrics: could not upload. metrics.jsonl has them all."
    )


def test_a_tracker_that_hangs_holds_nothing_up_but_the_end_and_that_not_for_long(
    base: TrainConfig, whole: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.2)
    config = in_folder(base, tmp_path / "run", report_to="hanging")
    recorder = Recorder()
    train(config, recorder)
    assert outcome_of(config.run) == whole
    assert recorder.said[-1] == "hanging did not end in time, and may lack the last metrics."


# A run that goes on


def test_a_run_interrupted_at_every_step_has_each_once(base: TrainConfig, tmp_path: Path) -> None:
    config = in_folder(base, tmp_path / "run", report_to="mirror")
    for _ in range(STEPS):
        with pytest.raises(KeyboardInterrupt):
            train(config, stopping(1))
    train(config)
    (points,) = Mirror.kept.values()
    assert [step for step, _ in points] == list(range(STEPS + 1))
    assert {step: without_speed(values) for step, values in points} == expected_points(config.run)
    assert Mirror.ends == [False] * STEPS + [True]


def test_steps_that_a_tracker_had_before_the_run_went_back_are_not_there_twice(
    base: TrainConfig, tmp_path: Path
) -> None:
    config = in_folder(base, tmp_path / "run", report_to="mirror")
    with pytest.raises(KeyboardInterrupt):
        train(config, stopping(6))
    (points,) = Mirror.kept.values()
    assert [step for step, _ in points] == list(range(6))
    max(layout.RunFolder(config.run).checkpoints.iterdir()).write_bytes(b"")
    recorder = Recorder()
    train(config, recorder)
    assert "Going on from step 4 of 8." in recorder.said
    assert {step: without_speed(values) for step, values in points} == expected_points(config.run)
    assert [step for step, _ in points] == list(range(STEPS + 1))


def test_a_tracker_that_failed_or_comes_later_catches_up(
    base: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To report or not is no other run."""
    config = in_folder(base, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(config, stopping(3))
    monkeypatch.setattr(Failing, "at", 2)
    with pytest.raises(KeyboardInterrupt):
        train(in_folder(config, config.run, report_to="failing"), stopping(2))
    (points,) = Mirror.kept.values()
    assert [step for step, _ in points] == [0]
    train(in_folder(config, config.run, report_to="mirror"))
    assert {step: without_speed(values) for step, values in points} == expected_points(config.run)
    assert [step for step, _ in points] == list(range(STEPS + 1))
