"""A learning rate that is too high ends a run that all its numbers, finite as they are, would let go on."""

from __future__ import annotations

import json
import math
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.config import FuseConfig, TrainConfig
from mlx_distill.errors import TrainingError
from mlx_distill.fuse import fuse
from mlx_distill.layout import RunFolder
from mlx_distill.training import loop
from mlx_distill.training.divergence import WINDOW, far_above
from mlx_distill.training.run import train
from tests.training.faults import wild_from
from tests.training.runs import AtStep, chat, make_data, metrics, online, outcome, settings

#: Of nothing that the base knows.
FOREIGN = {"messages": [{"role": "user", "content": "Ω"}, {"role": "assistant", "content": "§ ¶ Ж щ" * 5}]}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("divergence") / "data")


@pytest.fixture(scope="module")
def knowing(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that knows all its rows well. A random one has nothing to lose: its loss is that of guessing."""
    folder = tmp_path_factory.mktemp("knowing")
    data = make_data(folder / "data", train=15, valid=0, test=0)
    record = train(settings(data, tiny_model, folder / "run", epochs=14, learning_rate=0.02, layers="all", rank=16))
    assert record.train_loss is not None
    assert record.train_loss < 1
    fuse(FuseConfig(run=folder / "run"))
    return RunFolder(folder / "run").fused


def config(data: Path, model: Path, run: Path, **changes: Any) -> TrainConfig:
    """Seven epochs of four steps."""
    chosen = {"epochs": 7, "layers": "all", "schedule": "constant", "warmup": 0.0, "learning_rate": 1.0, **changes}
    return settings(data, model, run, **chosen)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor", "muon"])
@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_a_learning_rate_that_is_too_high_is_told(
    data: Path, knowing: Path, tmp_path: Path, optimizer: str, adapter: str
) -> None:
    given = config(data, knowing, tmp_path / "run", optimizer=optimizer, adapter=adapter)
    with pytest.raises(TrainingError, match="Training diverges") as caught:
        train(given)
    text = str(caught.value)
    rows = metrics(given.run)
    steps = [row for row in rows if row["kind"] == "step"]
    valid = [row for row in rows if row["kind"] == "valid"]
    assert len(steps) == WINDOW
    assert all(math.isfinite(row["loss"]) for row in rows)
    assert "--learning-rate" in text
    lowest, window, now, kept = (float(number) for number in re.findall(r"\d+\.\d\d", text)[:4])
    assert window == pytest.approx(mean(steps), abs=0.01)
    assert lowest == pytest.approx(min(valid[0]["loss"], steps[0]["loss"]), abs=0.01)
    assert now > 2 * kept
    best = min(valid, key=lambda row: row["loss"])["step"]
    assert f"the adapter of step {best}, which stands in {given.run}" in text
    # The same command comes to the same end.
    with pytest.raises(TrainingError) as again:
        train(given)
    assert str(again.value) == text
    assert metrics(given.run) == rows


def mean(rows: list[dict[str, Any]]) -> float:
    """Over tokens."""
    return sum(row["loss"] * row["target_tokens"] for row in rows) / sum(row["target_tokens"] for row in rows)


def test_it_is_told_after_an_interruption_at_any_step_as_without_one(data: Path, knowing: Path, tmp_path: Path) -> None:
    whole = config(data, knowing, tmp_path / "whole", dropout=0.1)
    with pytest.raises(TrainingError) as expected:
        train(whole)
    for step in (1, 7, 12, 19):
        given = config(data, knowing, tmp_path / f"run{step}", dropout=0.1)
        with pytest.raises(KeyboardInterrupt):
            train(given, AtStep(step, lambda: signal.raise_signal(signal.SIGINT)))
        with pytest.raises(TrainingError) as found:
            train(given)
        assert str(found.value) == str(expected.value).replace("/whole", f"/run{step}")
        assert metrics(given.run) == metrics(whole.run)
        assert RunFolder(given.run).adapter.read_bytes() == RunFolder(whole.run).adapter.read_bytes()


def test_what_was_learned_before_can_be_taken(
    data: Path, knowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs go well, and then the learning rate leaps."""
    wild_from(monkeypatch, 8, 1.0)
    given = config(data, knowing, tmp_path / "run", learning_rate=1e-3, checkpoint_every=1)
    with pytest.raises(TrainingError, match="Training diverges") as caught:
        train(given)
    assert "; or take the adapter of step 8: the same command with --finish" in str(caught.value)
    adapter = RunFolder(given.run).adapter.read_bytes()
    record = train(given.model_copy(update={"finish": True}))
    assert RunFolder(given.run).adapter.read_bytes() == adapter
    assert (record.status, record.best_step, record.cut_short) == ("finished", 8, True)
    # The checkpoint before the step at which it was seen: what it holds was validated, and is worse.
    assert record.steps == WINDOW - 1
    last = [row for row in metrics(given.run) if row["kind"] == "valid"][-1]
    assert last["step"] == record.steps
    assert last["loss"] > 2 * record.valid_loss
    assert record.test_loss is not None and record.test_loss < record.valid_loss + 1
    fuse(FuseConfig(run=given.run))


def test_without_a_validation_the_adapter_from_before_is_kept(knowing: Path, tmp_path: Path) -> None:
    """An epoch's end would keep the last one: it is looked at first, however few steps there were."""
    data = make_data(tmp_path / "data", valid=0, test=0)
    given = config(data, knowing, tmp_path / "run", learning_rate=1e-9)
    with pytest.raises(KeyboardInterrupt):
        train(given, AtStep(1, lambda: signal.raise_signal(signal.SIGINT)))
    start = RunFolder(given.run).adapter.read_bytes()
    wild = config(data, knowing, tmp_path / "wild")
    with pytest.raises(TrainingError, match="with the adapter of step 0, which stands"):
        train(wild)
    assert RunFolder(wild.run).adapter.read_bytes() == start
    assert len([row for row in metrics(wild.run) if row["kind"] == "step"]) == 4


# What is none


@pytest.mark.parametrize("adapter", ["lora", "dora"])
def test_rows_of_unlike_difficulty_are_no_divergence_and_looking_changes_nothing(
    knowing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: str
) -> None:
    """Every step a window of its own, on rows that lose 1 nat or 10: suspicion at every other step, and no more."""
    data = make_data(tmp_path / "data", valid=2)
    rows = [chat(at) if at % 2 else FOREIGN for at in range(10)]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def given(name: str) -> TrainConfig:
        return config(
            data, knowing, tmp_path / name, learning_rate=1e-4, epochs=2, batch_size=1, dropout=0.2, adapter=adapter
        )

    train(given("plain"))
    monkeypatch.setattr(loop, "WINDOW", 1)
    compared = []

    def noting(loss: float, reference: float) -> bool:
        compared.append(far_above(loss, reference))
        return compared[-1]

    monkeypatch.setattr(loop, "far_above", noting)
    train(given("watched"))
    assert outcome(tmp_path / "watched") == outcome(tmp_path / "plain")
    assert compared.count(True) >= 5  # suspicions
    assert len(compared) == 20 + compared.count(True)  # each compared on its rows, and refuted


def test_a_run_that_learns_is_never_suspected(data: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert train(config(data, tiny_model, tmp_path / "run", learning_rate=0.02)).steps == 28


@pytest.mark.parametrize(
    ("loss", "reference", "far"),
    [(1.0, 0.0, False), (1.01, 0.0, True), (1.5, 0.6, False), (1.61, 0.6, True), (6.0, 3.0, False), (6.1, 3.0, True)],
)
def test_far_is_both_a_nat_and_twice_as_much(loss: float, reference: float, far: bool) -> None:
    assert far_above(loss, reference) == far


@pytest.mark.parametrize("own", [0.0, 0.5])
def test_what_is_minimised_is_watched(
    data: Path, tiny_model: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: float
) -> None:
    """Not the cross-entropy, which a teacher that says something else than the text raises, and rightly so.

    A window of two steps is looked at when it ends, also where that step was on the student's own answers; these have
    no like, and are left out.
    """
    seen: list[float] = []

    def noting(loss: float, reference: float) -> bool:
        seen.append(loss)
        return False

    monkeypatch.setattr(loop, "WINDOW", 2)
    monkeypatch.setattr(loop, "far_above", noting)
    config = online(data, tiny_model, tmp_path / "run", teacher, distill_weight=0.75, on_policy=own, epochs=4, seed=1)
    train(config)
    steps = [row for row in metrics(tmp_path / "run") if row["kind"] == "step"]
    expected, left = [], 0
    for at in range(0, len(steps), 2):
        taught = [row for row in steps[at : at + 2] if not row.get("on_policy")]
        left += 2 - len(taught)
        if taught:
            tokens = sum(row["target_tokens"] for row in taught)
            minimised = sum(row["target_tokens"] * (0.25 * row["loss"] + 0.75 * row["divergence"]) for row in taught)
            expected.append(minimised / tokens)
    assert bool(left) == bool(own)
    assert seen == pytest.approx(expected, rel=1e-6)
