"""The list of runs: what it finds, what it makes of records that are old, damaged or under way, and what differs."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_distill import layout
from mlx_distill.errors import InputError
from mlx_distill.run_list import RunEntry, comparable, list_runs, settings_that_differ
from tests.children import child
from tests.run_folders import RECORD, row, write, write_metrics


def names(entries: list[RunEntry]) -> list[str]:
    return [entry.name for entry in entries]


def only(folder: Path) -> RunEntry:
    (entry,) = list_runs(folder)
    return entry


# Where runs are found


def test_runs_are_found_below_and_in_groups(tmp_path: Path) -> None:
    for name in ("a", "group/b", "group/c", "group/deeper/d", ".hidden", "group/.hidden"):
        write(tmp_path / name)
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    assert sorted(names(list_runs(tmp_path))) == ["a", "group/b", "group/c"]


def test_a_folder_that_is_a_run_is_listed_alone(tmp_path: Path) -> None:
    write(tmp_path / "mine")
    write(tmp_path / "mine" / "other")
    entry = only(tmp_path / "mine")
    assert (entry.name, entry.folder) == ("mine", str(tmp_path / "mine"))


def test_a_run_has_its_name_from_inside_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path / "mine"))
    assert names(list_runs(Path())) == ["mine"]


def test_what_is_no_run_is_not_listed(tmp_path: Path) -> None:
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "model.safetensors").touch()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    assert list_runs(tmp_path) == []


@pytest.mark.parametrize("name", ["nowhere", "file", "file/below", "circle", "n" * 300])
def test_a_folder_that_cannot_be_read_is_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(InputError, match=r"no such folder|cannot be read: \w"):
        list_runs(tmp_path / name)


def test_listing_writes_nothing(tmp_path: Path) -> None:
    write(tmp_path / "done")
    write_metrics(write(tmp_path / "open", status="running"), row("step", 1, 1.0))
    (tmp_path / "empty").mkdir()

    def seen() -> set[tuple[str, int]]:
        return {(str(path), path.stat().st_mtime_ns) for path in (tmp_path, *tmp_path.rglob("*"))}

    before = seen()
    assert len(list_runs(tmp_path)) == 2
    assert seen() == before


# What a record says


def test_all_that_is_known_of_a_finished_run_is_listed(tmp_path: Path) -> None:
    entry = only(write(tmp_path / "mine"))
    settings = {key: value for key, value in RECORD["config"].items() if key != "run"}
    assert entry == RunEntry(
        name="mine",
        folder=str(tmp_path / "mine"),
        status="finished",
        step=9,
        planned_steps=9,
        model="Model",
        model_revision="abcdef0123456789",
        rows=10,
        tokens=1000,
        epochs=3,
        planned_epochs=3,
        rank=8,
        layers="all",
        learning_rate=2e-4,
        first_valid_loss=2.5,
        valid_loss=1.75,
        token_accuracy=0.5,
        test_loss=1.9,
        tokens_per_second=250.5,
        peak_memory_bytes=2 * 10**9,
        seconds=12.5,
        created="2026-11-24T10:00:00+00:00",
        version="0.1.0",
        device="CPU",
        settings=settings,
        data_sha256={"train": "a" * 64, "valid": "b" * 64},
    )


def test_a_record_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    """Of an older version, which lacks fields, or of a later one, which has more."""
    write(tmp_path / "old", **{key: None for key in RECORD if key not in ("status", "valid_loss", "config")})
    write(tmp_path / "new", model={"size": 5}, config={"batch_size": "auto"}, splits={"extra": {"rows": 1}})
    old, new = sorted(list_runs(tmp_path), key=lambda entry: entry.name == "new")
    assert (old.status, old.valid_loss, old.rank) == ("finished", 1.75, 8)
    assert (old.model, old.rows, old.created, old.planned_steps, old.data_sha256) == (None, None, None, None, {})
    assert (new.status, new.model, new.planned_steps) == ("finished", "Model", None)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "run.json: Invalid JSON: EOF"),
        (b'{"status": "fin', "run.json: Invalid JSON: EOF"),
        (b"\xff\xfe\x00", "run.json: Invalid JSON"),
        (b"[]", "run.json: Input should be an object"),
        (b"null", "run.json: Input should be an object"),
        (b"{}", "run.json: status: Field required"),
        (b'{"status": "paused"}', "run.json: status: Input should be 'running' or 'finished'"),
        (b'{"status": "finished", "format": 2}', "run.json: format: Input should be 1"),
        (b'{"status": "finished", "valid_loss": "low"}', "run.json: valid_loss: Input should be a valid number"),
        (b'{"status": "finished", "valid_loss": NaN}', "run.json: valid_loss: Input should be a finite number"),
        (b'{"status": "finished", "splits": {"train": 5}}', "run.json: splits.train: Input should be"),
        (b"[" * 100_000, "run.json: Invalid JSON: recursion"),
    ],
)
def test_a_damaged_record_is_named_beside_the_others(tmp_path: Path, content: bytes, reason: str) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    layout.RunFolder(tmp_path / "a").record.write_bytes(content)
    good, damaged = list_runs(tmp_path)
    assert (good.name, good.status) == ("b", "finished")
    assert (damaged.name, damaged.status) == ("a", "damaged")
    assert damaged.problem is not None
    assert damaged.problem.startswith(reason)


def test_a_record_that_cannot_be_read_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a" / "run.json").mkdir(parents=True)
    assert only(tmp_path).problem == "run.json cannot be read: Is a directory."


def test_an_adapter_and_its_record_belong_together(tmp_path: Path) -> None:
    layout.RunFolder(write(tmp_path / "gone")).adapter.unlink()
    layout.RunFolder(write(tmp_path / "undescribed")).record.unlink()
    found = {entry.name: (entry.status, entry.problem) for entry in list_runs(tmp_path)}
    assert found == {
        "gone": ("damaged", "run.json says that it is finished, but its adapter is missing."),
        "undescribed": ("damaged", "its adapter is there, but no run.json that describes it."),
    }


@pytest.mark.parametrize(
    ("rows", "batch_size", "epochs", "steps"), [(10, 4, 3, 9), (8, 4, 1, 2), (1, 4, 2, 2), (9, 1, 1, 9)]
)
def test_the_steps_that_a_run_will_take(tmp_path: Path, rows: int, batch_size: int, epochs: int, steps: int) -> None:
    train = {**RECORD["splits"]["train"], "rows": rows}
    write(tmp_path / "run", splits={"train": train}, config={"batch_size": batch_size, "epochs": epochs})
    assert only(tmp_path).planned_steps == steps


# Runs that are not finished


def test_progress_comes_from_the_metrics(tmp_path: Path) -> None:
    root = write(tmp_path / "run", status="running", epochs=0, steps=0)
    write_metrics(
        root,
        row("valid", 0, 5.0, loss=2.5),
        row("step", 1, 6.0, tokens=100),
        row("step", 2, 8.0, tokens=200),
        row("step", 3, 9.0, tokens=60),
        row("train", 3, 9.0),
        row("valid", 3, 20.0, loss=1.5, token_accuracy=0.75),
        row("step", 4, 21.0, tokens=80),
        row("valid", 4, 30.0, loss=1.625, token_accuracy=0.5),
    )
    entry = only(root)
    assert (entry.status, entry.step, entry.planned_steps, entry.epochs) == ("stopped", 4, 9, 4 / 3)
    assert (entry.first_valid_loss, entry.valid_loss, entry.token_accuracy) == (2.5, 1.5, 0.75)
    assert entry.tokens_per_second == (100 + 200 + 60 + 80) / (1 + 2 + 1 + 1)  # and not the time of evaluations
    assert entry.seconds == 30.0


@pytest.mark.parametrize(
    "junk", [b"", b"\n", b"\x00" * 50, b'{"kind": "step", "step": 9', b"{}\n", b'["valid"]\n', b"\xff\n", b'"valid"']
)
def test_junk_in_the_metrics_hides_no_row(tmp_path: Path, junk: bytes) -> None:
    root = write(tmp_path / "run", status="running")
    write_metrics(root, *([junk] if junk.endswith(b"\n") else []), row("valid", 0, 1.0), row("step", 1, 2.0), junk)
    entry = only(root)
    assert (entry.status, entry.step, entry.valid_loss, entry.tokens_per_second) == ("stopped", 1, 2.0, 100.0)


@pytest.mark.parametrize("metrics", [None, b"", b"\x00" * 300_000])
def test_without_metrics_not_a_step_is_known(tmp_path: Path, metrics: bytes | None) -> None:
    root = write(tmp_path / "run", status="running")
    if metrics is not None:
        write_metrics(root, metrics)
    entry = only(root)
    assert (entry.status, entry.step, entry.planned_steps, entry.epochs) == ("stopped", 0, 9, 0)
    assert (entry.valid_loss, entry.tokens_per_second, entry.seconds) == (None, None, None)


def test_metrics_of_any_length_are_read_in_little_memory(tmp_path: Path) -> None:
    root = write(tmp_path / "run", status="running")
    steps = 50_000
    first, middle = row("valid", 0, 0.5, loss=3.0), row("valid", 2, 2.5, loss=1.0)
    write_metrics(root, first, *(row("step", step, float(step)) for step in (1, 2)), middle)
    with layout.RunFolder(root).metrics.open("ab") as file:
        file.writelines(row("step", 3, 3.0).replace('"step":3', f'"step":{step}').encode() for step in range(3, steps))
        file.write(b"x" * 8_000_000)
    tracemalloc.start()
    try:
        entry = only(root)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert (entry.step, entry.first_valid_loss, entry.valid_loss) == (steps - 1, 3.0, 1.0)


def test_a_run_that_a_process_holds_is_in_training(tmp_path: Path) -> None:
    root = write(tmp_path / "run", status="running")
    write_metrics(root, row("step", 1, 1.0))
    (tmp_path / "new").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "ledger.db").touch()
    source = (
        "with layout.lock(argv[0]), layout.lock(argv[1]), layout.lock(argv[2]):\n"
        "    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    process = child(source, root, tmp_path / "new", tmp_path / "data")
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        held = {entry.name: (entry.status, entry.process) for entry in list_runs(tmp_path)}
    finally:
        process.kill()
        process.communicate()
    assert held == {"run": ("training", process.pid), "new": ("starting", process.pid)}
    free = {entry.name: (entry.status, entry.process) for entry in list_runs(tmp_path)}
    assert free == {"run": ("stopped", None)}


# The order


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("created", ["a", "b", "c", "none", "z"]),
        ("loss", ["c", "a", "b", "none", "z"]),
        ("accuracy", ["b", "c", "a", "none", "z"]),
        ("time", ["b", "a", "c", "none", "z"]),
    ],
)
def test_the_best_come_first_and_the_unknown_last(tmp_path: Path, order: Any, expected: list[str]) -> None:
    figures = {"a": ("12T00", 2.0, 0.1, 20.0), "b": ("11T23", 3.0, 0.9, 10.0), "c": ("11T22", 1.0, 0.5, 30.0)}
    for name, (hour, loss, accuracy, seconds) in figures.items():
        write(
            tmp_path / name,
            created=f"2026-01-{hour}:00:00+00:00",
            valid_loss=loss,
            token_accuracy=accuracy,
            seconds=seconds,
        )
    write(tmp_path / "none", created=None, valid_loss=None, token_accuracy=None, seconds=None)
    (tmp_path / "z").mkdir()
    layout.RunFolder(tmp_path / "z").record.touch()
    assert names(list_runs(tmp_path, order=order)) == expected


def test_times_are_compared_across_time_zones(tmp_path: Path) -> None:
    write(tmp_path / "earlier", created="2026-01-02T01:00:00+05:00")
    write(tmp_path / "later", created="2026-01-01T21:00:00+00:00")
    write(tmp_path / "never", created="yesterday")
    assert names(list_runs(tmp_path)) == ["later", "earlier", "never"]


# What differs


def differing(tmp_path: Path, *changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    for number, change in enumerate(changes):
        write(tmp_path / "runs" / f"r{number}", **change)
    return settings_that_differ(list_runs(tmp_path / "runs"))


def test_only_what_differs_is_told(tmp_path: Path) -> None:
    assert differing(tmp_path, {}, {"config": {"rank": 16, "grad_clip": 1.0}}) == {
        "rank": {"r0": 8, "r1": 16},
        "grad_clip": {"r0": None, "r1": 1.0},
    }


@pytest.mark.parametrize(
    ("one", "other", "differ"),
    [
        ({"rank": 8}, {"rank": 8.0}, False),
        ({"rslora": False}, {"rslora": 0}, True),
        ({"layers": 16}, {"layers": "16"}, True),
        ({"new": 1}, {}, False),  # not stated
        ({"run": "x"}, {"run": "y"}, False),
        ({"data": "data/moved"}, {}, False),  # the same rows elsewhere
        ({"model": "other-name"}, {}, False),  # the same model by another name
    ],
)
def test_what_makes_a_difference(tmp_path: Path, one: Any, other: Any, differ: bool) -> None:
    assert bool(differing(tmp_path, {"config": one}, {"config": other})) is differ


def test_a_run_that_does_not_state_a_setting_has_no_value_of_it(tmp_path: Path) -> None:
    assert differing(tmp_path, {"config": {"dropout": 0.1}}, {"config": {"dropout": 0.2}}, {}) == {
        "dropout": {"r0": 0.1, "r1": 0.2}
    }


def test_data_and_models_are_told_apart_by_content(tmp_path: Path) -> None:
    train = {**RECORD["splits"]["train"], "sha256": "c" * 64}
    found = differing(tmp_path, {}, {"splits": {"train": train}, "model": {"revision": "f" * 40}, "device": "GPU"})
    assert found == {
        "train rows": {"r0": "data/mine (aaaaaaaa)", "r1": "data/mine (cccccccc)"},
        "model": {"r0": "Model (abcdef01)", "r1": "Model (ffffffff)"},
        "device": {"r0": "CPU", "r1": "GPU"},
    }


def test_damaged_runs_make_no_difference(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "gone", config={"rank": 64})
    layout.RunFolder(tmp_path / "runs" / "gone").adapter.unlink()
    assert differing(tmp_path, {}, {}) == {}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"splits": {"train": {**RECORD["splits"]["train"], "sha256": "c" * 64}}}, True),
        ({"splits": {"valid": {**RECORD["splits"]["valid"], "sha256": "c" * 64}}}, False),
        ({"model": {"name": "Another"}}, False),
        ({"splits": None}, True),  # not known to be others
        ({"model": {"name": "Another"}, "valid_loss": None}, True),  # it has no loss
    ],
)
def test_losses_are_comparable_on_the_same_rows_with_the_same_model(
    tmp_path: Path, change: dict[str, Any], expected: bool
) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", **change)
    assert comparable(list_runs(tmp_path)) is expected


# The whole, on a run that was trained


def test_a_run_is_listed_as_it_was_trained(tmp_path: Path, tiny_model: Path) -> None:
    from mlx_distill.training.run import train
    from tests.training.runs import AtStep, make_data, settings

    config = settings(make_data(tmp_path / "data"), tiny_model, tmp_path / "runs" / "mine")
    seen: list[RunEntry] = []
    look: Callable[[], None] = lambda: seen.append(only(tmp_path / "runs"))  # noqa: E731
    record = train(config, AtStep(6, look))
    assert [(one.status, one.process, one.step, one.planned_steps) for one in seen] == [("training", os.getpid(), 6, 8)]
    entry = only(tmp_path / "runs")
    assert entry.status == "finished"
    for key in ("first_valid_loss", "valid_loss", "token_accuracy", "test_loss", "seconds", "peak_memory_bytes"):
        assert getattr(entry, key) == getattr(record, key) is not None
    assert (entry.step, entry.planned_steps, entry.epochs) == (record.steps, record.steps, 2)
    assert (seen[0].first_valid_loss, seen[0].model) == (record.first_valid_loss, record.model.name)
