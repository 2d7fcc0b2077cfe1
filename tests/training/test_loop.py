"""The epoch loop and the step `train`: metrics, the best adapter, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.backends.base import NO_TOKENS
from mlx_distill.backends.mlx.student import MlxStudent
from mlx_distill.batches import in_order
from mlx_distill.config import TrainConfig
from mlx_distill.dataset import load_splits
from mlx_distill.errors import ConfigError, FolderError, InputError, ModelError, TrainingError
from mlx_distill.layout import RunFolder, lock
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.runs import read_run
from mlx_distill.training.loop import Loop
from mlx_distill.training.run import train
from mlx_distill.training.schedule import learning_rate
from tests.tiny import make_tiny_model
from tests.training.runs import Recorder, chat, make_data, metrics, settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("loop") / "data")


@pytest.fixture
def config(data: Path, tiny_model: Path, tmp_path: Path) -> TrainConfig:
    return settings(data, tiny_model, tmp_path / "run")


def changed(config: TrainConfig, **changes: Any) -> TrainConfig:
    return TrainConfig.model_validate({**config.model_dump(), **changes})


def evaluate(config: TrainConfig, split: str, *, adapter: Path | None = None) -> float:
    """The loss of a split, by a student made anew."""
    student = MlxStudent(Path(config.model), config)
    if adapter is not None:
        student.load_adapter(adapter)
    tokenizer = load_tokenizer(Path(config.model))
    rows = load_splits(config.data, tokenizer, max_length=config.max_length)[split].rows
    return sum((student.evaluate(batch) for batch in in_order(rows, config.batch_size)), NO_TOKENS).loss


# What a run leaves


def test_the_metrics_are_whole(config: TrainConfig) -> None:
    record = train(config)
    rows = metrics(config.run)
    steps = [row for row in rows if row["kind"] == "step"]
    per_epoch = 4  # 10 rows in batches of 3
    kinds = ["valid", *(["step"] * per_epoch + ["train", "valid"]) * 2, "test"]
    assert [row["kind"] for row in rows] == kinds
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["epoch"] for row in steps] == pytest.approx([(at + 1) / per_epoch for at in range(8)])
    assert [row["learning_rate"] for row in steps] == [learning_rate(config, at, 8) for at in range(8)]
    assert all(row["grad_norm"] > 0 for row in steps)
    for row in rows:
        assert row["loss"] > 0
        assert 0 <= row["token_accuracy"] <= 1
        assert 0 < row["target_tokens"] < row["tokens"]
    for epoch in (0, 1):
        own = steps[epoch * per_epoch : (epoch + 1) * per_epoch]
        (summed,) = [row for row in rows if row["kind"] == "train" and row["epoch"] == epoch + 1]
        assert summed["tokens"] == sum(row["tokens"] for row in own) == record.splits["train"].tokens
        assert summed["target_tokens"] == record.splits["train"].target_tokens
        total = sum(row["loss"] * row["target_tokens"] for row in own)
        assert summed["loss"] == pytest.approx(total / summed["target_tokens"])
    valid = [row for row in rows if row["kind"] == "valid"]
    assert [row["epoch"] for row in valid] == [0, 1, 2]
    assert {row["tokens"] for row in valid} == {record.splits["valid"].tokens}
    assert record.first_valid_loss == valid[0]["loss"]
    assert record.train_loss == [row["loss"] for row in rows if row["kind"] == "train"][-1]
    assert record.test_loss == rows[-1]["loss"]


def test_the_record_is_whole(config: TrainConfig) -> None:
    record = train(config)
    assert read_run(config.run) == record
    assert (record.status, record.epochs, record.steps) == ("finished", 2, 8)
    assert {name: split.rows for name, split in record.splits.items()} == {"train": 10, "valid": 3, "test": 2}
    assert record.trainable_parameters > 0
    assert record.tokens_per_second is not None
    assert record.tokens_per_second > 0
    assert record.peak_memory_bytes is not None
    assert record.peak_memory_bytes > 1e6
    assert record.seconds is not None
    assert record.seconds > 0
    assert record.config["model"] == config.model


def test_training_lowers_the_validation_loss(config: TrainConfig) -> None:
    record = train(config)
    assert record.valid_loss is not None
    assert record.first_valid_loss is not None
    assert record.valid_loss < record.first_valid_loss * 0.95


#: A row of which the training rows teach nothing: its loss only rises.
FOREIGN = {"messages": [{"role": "user", "content": "Ω"}, {"role": "assistant", "content": "§ ¶ Ж щ" * 5}]}


def with_valid(folder: Path, rows: list[dict[str, Any]]) -> Path:
    data = make_data(folder)
    (data / "valid.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return data


def test_the_adapter_kept_is_the_best_one(config: TrainConfig, tmp_path: Path) -> None:
    """Over such rows the validation loss falls, then rises: neither the first adapter nor the last is the best."""
    data = with_valid(tmp_path / "data", [FOREIGN, chat(20), chat(21)])
    config = changed(
        config, data=data, epochs=8, learning_rate=0.03, layers="all", schedule="constant", warmup=0.0, batch_size=3
    )
    record = train(config)
    valid = [(row["loss"], row["step"], row["token_accuracy"]) for row in metrics(config.run) if row["kind"] == "valid"]
    best = min(valid)
    assert best not in (valid[0], valid[-1])
    assert (record.valid_loss, record.best_step, record.token_accuracy) == best
    assert evaluate(config, "valid", adapter=config.run) == pytest.approx(record.valid_loss, rel=1e-6)
    assert evaluate(config, "test", adapter=config.run) == pytest.approx(record.test_loss, rel=1e-6)
    assert evaluate(config, "valid") == pytest.approx(valid[0][0], rel=1e-6)


def test_a_run_that_only_gets_worse_keeps_the_start(config: TrainConfig, tmp_path: Path) -> None:
    data = with_valid(tmp_path / "data", [FOREIGN])
    record = train(changed(config, data=data, learning_rate=0.02, layers="all"))
    assert record.best_step == 0
    assert record.valid_loss == record.first_valid_loss


def test_micro_batches_lead_to_the_same_adapter(config: TrainConfig, tmp_path: Path) -> None:
    record = train(config)
    other = train(changed(config, micro_batch_size=1, run=tmp_path / "micro"))
    assert other.valid_loss == pytest.approx(record.valid_loss, rel=1e-4)
    assert other.steps == record.steps


def test_the_same_run_twice_is_the_same_to_the_bit(config: TrainConfig, tmp_path: Path) -> None:
    config = changed(config, dropout=0.2)
    other = changed(config, run=tmp_path / "other")
    train(config)
    train(other)
    assert metrics(config.run) == metrics(other.run)
    assert RunFolder(config.run).adapter.read_bytes() == RunFolder(other.run).adapter.read_bytes()


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_are_kept_as_asked_for(config: TrainConfig, keep: int) -> None:
    train(changed(config, checkpoint_every=1, keep_checkpoints=keep))
    steps = sorted(int(path.stem.removeprefix("step-")) for path in RunFolder(config.run).checkpoints.iterdir())
    assert steps == list(range(9 - keep, 9))


def test_nothing_temporary_is_left(config: TrainConfig) -> None:
    train(config)
    left = sorted(path.name for path in config.run.iterdir())
    assert left == [".lock", "adapter_config.json", "adapters.safetensors", "checkpoints", "metrics.jsonl", "run.json"]


# Splits that are not there


@pytest.mark.parametrize("empty", [True, False])
def test_without_validation_the_last_adapter_is_kept(tiny_model: Path, tmp_path: Path, empty: bool) -> None:
    data = make_data(tmp_path / "data", valid=0, test=0)
    if empty:
        (data / "valid.jsonl").touch()
        (data / "test.jsonl").write_bytes(b"")
    recorder = Recorder()
    config = settings(data, tiny_model, tmp_path / "run")
    record = train(config, recorder)
    assert any("no valid.jsonl" in line for line in recorder.said)
    assert (record.valid_loss, record.test_loss, record.best_step) == (None, None, record.steps)
    assert [row["kind"] for row in metrics(config.run)] == (["step"] * 4 + ["train"]) * 2
    assert evaluate(config, "train", adapter=config.run) < evaluate(config, "train")


def test_fewer_rows_than_a_batch_are_trained_on(tiny_model: Path, tmp_path: Path) -> None:
    config = settings(make_data(tmp_path / "data", train=1), tiny_model, tmp_path / "run", batch_size=32)
    assert train(config).steps == 2


# What stops a run


def test_a_loss_that_is_not_finite_names_the_lines(config: TrainConfig) -> None:
    config = changed(config, learning_rate=1e30, schedule="constant", warmup=0.0)
    with pytest.raises(TrainingError) as caught:
        train(config)
    text = str(caught.value)
    found = text.partition("train.jsonl lines ")[2].partition(".")[0]
    lines = [int(number) for number in found.split(", ")]
    assert len(lines) == 3
    assert set(lines) <= set(range(1, 11))
    assert "step 2" in text
    assert "--learning-rate" in text
    assert "adapter of step 0 stands" in text
    assert "--finish" not in text  # it has learned nothing
    assert evaluate(config, "valid", adapter=config.run) == pytest.approx(metrics(config.run)[0]["loss"])
    assert {row["step"] for row in metrics(config.run)} == {0, 1}


def test_a_validation_loss_that_is_not_finite_is_told(config: TrainConfig) -> None:
    config = changed(config, learning_rate=1e30, schedule="constant", warmup=0.0, batch_size=10)
    with pytest.raises(TrainingError, match="validation loss is not finite after 1 step"):
        train(config)


def test_a_finished_run_is_returned_at_once(config: TrainConfig) -> None:
    record = train(config)
    before = {path: path.stat().st_mtime_ns for path in config.run.rglob("*") if path.name != ".lock"}
    recorder = Recorder()
    again = train(config, recorder)
    assert again == record
    assert any("finished already" in line for line in recorder.said)
    assert {path: path.stat().st_mtime_ns for path in config.run.rglob("*") if path.name != ".lock"} == before


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint_every": 7, "keep_checkpoints": 9},
        {"micro_batch_size": 1, "gradient_checkpointing": "on", "memory_limit": "8GB", "prefix_cache": "off"},
        {"finish": True},
    ],
)
def test_a_finished_run_may_be_asked_for_otherwise(config: TrainConfig, change: dict[str, Any]) -> None:
    """How often it was saved, or how much was computed at once, does not decide what came out."""
    record = train(config)
    assert train(changed(config, **change)) == record


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"epochs": 3}, "epochs 2 → 3"),
        ({"learning_rate": 1e-3}, "learning_rate 0.005 → 0.001"),
        ({"seed": 1, "rank": 2}, "rank 4 → 2; seed 0 → 1"),
        ({"layers": "all"}, "layers 2 → all"),
        ({"validate_every": 3}, "validate_every None → 3"),
    ],
)
def test_a_folder_that_holds_another_run_is_refused_by_what_differs(
    config: TrainConfig, change: dict[str, Any], says: str
) -> None:
    record = train(changed(config, epochs=2))
    with pytest.raises(FolderError) as caught:
        train(changed(config, **change))
    assert says in str(caught.value)
    assert str(config.run) in str(caught.value)
    assert train(config) == record


def test_changed_data_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    copy = changed(config, data=shutil.copytree(config.data, tmp_path / "copy"))
    train(copy)
    assert train(config).status == "finished"  # the same rows from elsewhere are the same run
    with (tmp_path / "copy" / "valid.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(FolderError, match="Different: the data set"):
        train(copy)


def test_a_changed_base_model_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    config = changed(config, model=str(model))
    train(config)
    make_tiny_model(model, seed=1)
    with pytest.raises(FolderError, match="the base model"):
        train(config)


def test_an_adapter_of_unknown_origin_is_not_written_over(config: TrainConfig) -> None:
    config.run.mkdir()
    RunFolder(config.run).adapter.write_bytes(b"precious")
    with pytest.raises(FolderError, match=r"no run\.json describes"):
        train(config)
    assert RunFolder(config.run).adapter.read_bytes() == b"precious"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2}', "\udcff"])
def test_a_broken_record_is_named(config: TrainConfig, content: str) -> None:
    config.run.mkdir()
    RunFolder(config.run).record.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=r"run\.json"):
        train(config)


def test_a_folder_in_use_is_refused(config: TrainConfig) -> None:
    with lock(config.run), pytest.raises(FolderError, match="in use by process"):
        train(config)


def test_a_student_without_a_chat_template_is_refused(config: TrainConfig, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "base", chat_template=None)
    with pytest.raises(ModelError, match="no chat template"):
        train(changed(config, model=str(model)))


def test_bad_settings_leave_the_folder_free(config: TrainConfig) -> None:
    """What is refused before the first step must not stand in the way of the corrected command."""
    with pytest.raises(ConfigError):
        train(changed(config, layers=40))
    with pytest.raises(InputError):
        train(changed(config, max_length=8))
    assert train(config).status == "finished"


def test_an_unfinished_run_cannot_be_used(config: TrainConfig) -> None:
    with pytest.raises(InputError, match="Train first"):
        read_run(config.run)
    record = train(config)
    unfinished = record.model_copy(update={"status": "running"})
    RunFolder(config.run).record.write_text(json.dumps(unfinished.model_dump(mode="json")), encoding="utf-8")
    with pytest.raises(InputError, match="not finished"):
        read_run(config.run)


def test_the_loop_counts_its_steps(config: TrainConfig, tiny_model: Path) -> None:
    splits = load_splits(config.data, load_tokenizer(tiny_model), max_length=config.max_length)
    student = MlxStudent(tiny_model, config)
    plan = train(config).plan
    assert plan is not None
    for size, steps in ((1, 10), (3, 4), (10, 1), (11, 1)):
        loop = Loop(student, splits, changed(config, batch_size=size), RunFolder(config.run), plan, Recorder())
        assert (loop.steps_per_epoch, loop.total_steps) == (steps, 2 * steps)
