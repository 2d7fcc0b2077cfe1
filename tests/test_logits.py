"""A teacher's logits on disk, and a student that learns them: round trips, kills, damage, and what must be equal."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load
from safetensors.numpy import load_file, save_file

from mlx_distill.batches import make_batch
from mlx_distill.config import LogitsConfig
from mlx_distill.dataset import load_splits
from mlx_distill.errors import ConfigError, InputError, MlxDistillError, OccupiedError
from mlx_distill.layout import logits_record
from mlx_distill.logit_cache import LogitsRecord
from mlx_distill.logit_source import open_logits
from mlx_distill.logits import logits_folder, write_logits
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.settings import parse_settings
from mlx_distill.training.run import train
from tests.tiny import make_tiny_model
from tests.training.runs import ROOT, AtStep, Recorder, environment, make_data, metrics, outcome, settings

TOP_K = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write into it."""
    return make_data(tmp_path_factory.mktemp("taught") / "data")


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory, data: Path, teacher: Path) -> Path:
    """Do not write into it."""
    out = tmp_path_factory.mktemp("logits") / "whole"
    write_logits(LogitsConfig(data=data, teacher=f"mlx:{teacher}", top_k=TOP_K, out=out))
    return out


def readers(
    folder: Path, data: Path, model: Path, **limits: Any
) -> tuple[LogitsRecord, dict[str, Any], dict[str, Any]]:
    tokenizer: Any = load_tokenizer(model)
    splits = load_splits(data, tokenizer, max_length=limits.get("max_length", 2048))
    record, found = open_logits(folder, splits, tokenizer, 384)
    return record, found, splits


# What the teacher says


def test_the_logits_are_the_models_own(logits: Path, data: Path, teacher: Path) -> None:
    record, found, splits = readers(logits, data, teacher)
    model, _ = load(str(teacher))
    model.set_dtype(mx.float32)
    assert set(found) == {"train", "valid", "test"}
    for name, split in splits.items():
        for at in range(len(split.rows)):
            batch = found[name].with_teacher(make_batch(split.rows, [at]))
            row = split.rows[at]
            places = np.flatnonzero(row.loss_mask)
            whole = np.array(model(mx.array([row.tokens.tolist()]))[0]).astype(np.float64)[places - 1]
            whole -= np.log(np.exp(whole).sum(-1, keepdims=True))
            best = np.sort(np.argsort(-whole, axis=-1)[:, :TOP_K], axis=-1)
            np.testing.assert_array_equal(batch.teacher.ids, best)
            named = np.take_along_axis(whole, best, axis=-1)
            np.testing.assert_allclose(batch.teacher.log_probs[:, :-1], named, rtol=2**-10, atol=1e-4)
            rest = np.log1p(-np.exp(named).sum(-1))
            np.testing.assert_allclose(batch.teacher.log_probs[:, -1], rest, rtol=2**-10, atol=1e-3)
    assert record.entry_bytes == 4 * TOP_K + 8
    positions = sum(split.positions for split in record.splits.values())
    assert sum(path.stat().st_size for path in logits.glob("*.logits")) == positions * record.entry_bytes


def test_a_batch_gets_the_words_of_its_own_rows_in_its_order(logits: Path, data: Path, teacher: Path) -> None:
    _, found, splits = readers(logits, data, teacher)
    rows = [7, 0, 4]
    together = found["train"].with_teacher(make_batch(splits["train"].rows, rows)).teacher
    apart = [found["train"].with_teacher(make_batch(splits["train"].rows, [row])).teacher for row in rows]
    np.testing.assert_array_equal(together.ids, np.concatenate([one.ids for one in apart]))
    np.testing.assert_array_equal(together.log_probs, np.concatenate([one.log_probs for one in apart]))


def test_a_whole_vocabulary_leaves_no_rest(tmp_path: Path, data: Path, teacher: Path) -> None:
    record = write_logits(LogitsConfig(data=data, teacher=str(teacher), top_k=384, out=tmp_path / "all"))
    assert record.words == 384
    _, found, splits = readers(tmp_path / "all", data, teacher)
    batch = found["valid"].with_teacher(make_batch(splits["valid"].rows, [0]))
    assert not batch.teacher.has_rest
    np.testing.assert_allclose(np.exp(batch.teacher.log_probs.astype(np.float64)).sum(-1), 1, atol=2e-3)


def test_a_student_may_leave_out_longer_rows_than_the_teacher_did(logits: Path, data: Path, teacher: Path) -> None:
    _, whole, splits = readers(logits, data, teacher)
    longest = int(splits["train"].lengths.max())
    _, found, fewer = readers(logits, data, teacher, max_length=longest - 1)
    assert 0 < len(fewer["train"].rows) < len(splits["train"].rows)
    for at, line in enumerate(fewer["train"].lines):
        there = int(np.flatnonzero(splits["train"].lines == line)[0])
        ours = found["train"].with_teacher(make_batch(fewer["train"].rows, [at])).teacher
        theirs = whole["train"].with_teacher(make_batch(splits["train"].rows, [there])).teacher
        np.testing.assert_array_equal(ours.ids, theirs.ids)


# Stopped, damaged, mistaken


def test_a_killed_teacher_goes_on_and_gives_the_same(tmp_path: Path, teacher: Path) -> None:
    data = make_data(tmp_path / "data", train=40)
    config = LogitsConfig(data=data, teacher=str(teacher), top_k=TOP_K, batch_size=1, out=tmp_path / "killed")
    whole = config.model_copy(update={"out": tmp_path / "whole"})
    write_logits(whole)
    command = [sys.executable, "-m", "mlx_distill", "logits", "--data", str(data), "--teacher", str(teacher)]
    command += ["--top-k", str(TOP_K), "--batch-size", "1", "--out", str(tmp_path / "killed")]
    done = tmp_path / "killed" / "train.done"
    for least in (1, 12):
        child = subprocess.Popen(command, env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while child.poll() is None and time.monotonic() < deadline:
            if done.exists() and done.stat().st_size >= 8 * least:
                break
            time.sleep(0.002)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert done.stat().st_size >= 8 * least
    with done.open("ab") as file:
        file.write(b"\7\7\7")
    watching = Recorder()
    write_logits(config, watching)
    for name in ("train", "valid", "test"):
        ours, theirs = ((folder / f"{name}.logits").read_bytes() for folder in (config.out, whole.out))  # type: ignore[operator]
        assert ours == theirs


def test_what_is_damaged_is_refused_and_made_again(tmp_path: Path, data: Path, teacher: Path) -> None:
    config = LogitsConfig(data=data, teacher=str(teacher), top_k=TOP_K, out=tmp_path / "logits")
    write_logits(config)
    path = tmp_path / "logits" / "train.logits"
    before = path.read_bytes()
    changed = bytearray(before)
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    _, found, splits = readers(tmp_path / "logits", data, teacher)
    with pytest.raises(InputError, match="damaged"):
        found["train"].with_teacher(make_batch(splits["train"].rows, range(len(splits["train"].rows))))
    write_logits(config)
    assert path.read_bytes() == before


def cut(folder: Path) -> None:
    path = folder / "train.logits"
    path.write_bytes(path.read_bytes()[:-1])


def unfinished(folder: Path) -> None:
    path = folder / "valid.done"
    path.write_bytes(path.read_bytes()[:-8])


def gone(folder: Path) -> None:
    logits_record(folder).unlink()


@pytest.mark.parametrize(
    ("harm", "said"), [(cut, "missing or cut"), (unfinished, "1 of 3 rows lack"), (gone, "no such file")]
)
def test_what_is_not_whole_is_refused(
    tmp_path: Path, data: Path, teacher: Path, harm: Callable[[Path], None], said: str
) -> None:
    write_logits(LogitsConfig(data=data, teacher=str(teacher), top_k=TOP_K, out=tmp_path / "logits"))
    harm(tmp_path / "logits")
    with pytest.raises(InputError, match=said):
        readers(tmp_path / "logits", data, teacher)


def test_swapped_splits_are_damaged_or_of_another_size(tmp_path: Path, teacher: Path) -> None:
    """Two data sets of the same size; the file of one under the record of the other."""
    one, two = make_data(tmp_path / "one", train=4), make_data(tmp_path / "two", train=4)
    (two / "train.jsonl").write_text(
        (two / "train.jsonl").read_text(encoding="utf-8").replace("value", "eulav"), encoding="utf-8"
    )
    for name, folder in (("a", one), ("b", two)):
        write_logits(LogitsConfig(data=folder, teacher=str(teacher), top_k=4, out=tmp_path / name))
    with pytest.raises(InputError, match=r"of another train\.jsonl"):
        readers(tmp_path / "a", two, teacher)
    (tmp_path / "a" / "train.logits").write_bytes((tmp_path / "b" / "train.logits").read_bytes())
    with pytest.raises(InputError, match=r"damaged|missing or cut"):
        _, found, splits = readers(tmp_path / "a", one, teacher)
        found["train"].with_teacher(make_batch(splits["train"].rows, range(4)))


@pytest.mark.parametrize(
    "changes",
    [{"top_k": 5}, {"teacher": "other"}, {"max_length": 1000}, {"data": "other"}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_folder_of_other_logits_is_left_alone(
    tmp_path: Path, data: Path, teacher: Path, tiny_model: Path, changes: dict[str, Any]
) -> None:
    config = LogitsConfig(data=data, teacher=str(teacher), top_k=TOP_K, out=tmp_path / "logits")
    write_logits(config)
    before = {path.name: path.read_bytes() for path in (tmp_path / "logits").iterdir() if path.is_file()}
    if "teacher" in changes:
        changes = {"teacher": str(tiny_model)}
    if "data" in changes:
        changes = {"data": make_data(tmp_path / "other", train=5)}
    with pytest.raises(OccupiedError, match=r"holds other logits\. Different"):
        write_logits(config.model_copy(update=changes))
    after = {path.name: path.read_bytes() for path in (tmp_path / "logits").iterdir() if path.is_file()}
    assert after == before


def test_another_tokenizer_is_told_by_its_content(tmp_path: Path, logits: Path, data: Path, teacher: Path) -> None:
    other = make_tiny_model(tmp_path / "other", vocabulary=390)
    # In what is told as long as the teacher is there.
    with pytest.raises(InputError, match=r"their vocabularies differ: 6 only the student's .*, 3 under another id"):
        readers(logits, data, other)
    same = make_tiny_model(tmp_path / "same")
    template = same / "tokenizer_config.json"
    content = json.loads(template.read_text(encoding="utf-8"))
    before = content["chat_template"]
    content["chat_template"] = "{# says the same #}" + before
    template.write_text(json.dumps(content), encoding="utf-8")
    readers(logits, data, same)
    content["chat_template"] = "Well." + before
    template.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match="their chat templates write the rows of this data set otherwise"):
        readers(logits, data, same)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": "anthropic:claude-sonnet-4-6"}, "gives text alone"),
        ({"top_k": 385}, "more than the 384 words"),
        ({"top_k": 65_536}, "at most 65,535"),
        ({"teacher": "/nowhere/at/all"}, "nowhere"),
        ({"data": Path("/nowhere/at/all")}, "no such folder"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, data: Path, teacher: Path, changes: dict[str, Any], said: str
) -> None:
    config = LogitsConfig(data=data, teacher=str(teacher), out=tmp_path / "logits")
    with pytest.raises(MlxDistillError, match=said):
        write_logits(config.model_copy(update=changes))
    assert not logits_record(tmp_path / "logits").exists()


def test_the_default_folder_is_beside_the_data(data: Path) -> None:
    found = logits_folder(LogitsConfig(data=data, teacher="mlx:Qwen/Qwen2.5-7B-Instruct"))
    assert found == data / "logits" / "Qwen2.5-7B-Instruct-64"


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"distill": "forward-kl"}, "distill needs a teacher"), ({"teacher_logits": "x"}, "is of no use without distill")],
)
def test_half_a_distillation_is_refused(data: Path, changes: dict[str, Any], said: str) -> None:
    from mlx_distill.config import TrainConfig

    with pytest.raises(ConfigError, match=said):
        parse_settings(TrainConfig, {"data": data, "run": "run", **changes}, where="usage")


# A student that learns them


def taught(data: Path, model: Path, run: Path, logits: Path, **changes: Any) -> Any:
    values = {"distill": "forward-kl", "teacher_logits": logits, **changes}
    return settings(data, model, run, **values)


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jsd"])
def test_a_copy_of_its_teacher_stays(tmp_path: Path, data: Path, tiny_model: Path, kind: str) -> None:
    out = tmp_path / "own"
    write_logits(LogitsConfig(data=data, teacher=str(tiny_model), top_k=TOP_K, out=out))
    # Adam makes steps of any gradient, however small: only a small rate leaves the student where it is.
    train(taught(data, tiny_model, tmp_path / "run", out, distill=kind, epochs=1, grad_clip=None, learning_rate=1e-7))
    rows = metrics(tmp_path / "run")
    # What float16 leaves of the teacher's digits.
    assert all(abs(row["divergence"]) < 1e-6 for row in rows)
    assert all(row["grad_norm"] < 1e-4 for row in rows if row["kind"] == "step")


def relative(folder: Path, model: Path) -> Path:
    """A model that differs from another by what an adapter of rank 4 can say."""
    shutil.copytree(model, folder)
    random = np.random.default_rng(7)
    weights = load_file(folder / "model.safetensors")
    for name, value in weights.items():
        if name.endswith("_proj.weight"):
            rows, columns = value.shape
            change = random.standard_normal((rows, 4)) @ random.standard_normal((4, columns))
            weights[name] = value + (2 * value.std() * change / change.std()).astype(value.dtype)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jsd"])
def test_a_student_comes_near_its_teacher(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    """To a tenth of where it began, on the rows that it learns from."""
    teacher = relative(tmp_path / "teacher", tiny_model)
    data, logits = make_data(tmp_path / "data", train=3, valid=1, test=0), tmp_path / "logits"
    write_logits(LogitsConfig(data=data, teacher=str(teacher), top_k=TOP_K, out=logits))
    changes = {"distill": kind, "epochs": 60, "rank": 16, "layers": "all", "learning_rate": 1e-2, "weight_decay": 0.0}
    record = train(taught(data, tiny_model, tmp_path / "run", logits, **changes))
    steps = [row for row in metrics(tmp_path / "run") if row["kind"] == "step"]
    assert np.mean([row["divergence"] for row in steps[-4:]]) < steps[0]["divergence"] / 10
    assert record.distilled_from == str(teacher)
    assert record.first_divergence is not None and record.divergence is not None
    assert record.divergence < record.first_divergence


def test_the_adapter_kept_is_the_one_nearest_to_the_teacher(
    tmp_path: Path, data: Path, tiny_model: Path, logits: Path
) -> None:
    record = train(taught(data, tiny_model, tmp_path / "run", logits, epochs=4, distill_weight=0.6))
    rows = [row for row in metrics(tmp_path / "run") if row["kind"] == "valid"]
    best = min(rows, key=lambda row: 0.4 * row["loss"] + 0.6 * row["divergence"])
    assert (record.best_step, record.valid_loss, record.divergence) == (best["step"], best["loss"], best["divergence"])


@pytest.mark.parametrize(
    "changes", [{}, {"gradient_checkpointing": "on"}, {"prefix_cache": "off"}, {"micro_batch_size": 1}]
)
def test_how_it_is_computed_changes_nothing(
    tmp_path: Path, data: Path, tiny_model: Path, logits: Path, changes: dict[str, Any]
) -> None:
    for name, more in (("plain", {}), ("other", changes)):
        train(taught(data, tiny_model, tmp_path / name, logits, distill="jsd", distill_weight=0.7, epochs=1, **more))
    for ours, theirs in zip(metrics(tmp_path / "plain"), metrics(tmp_path / "other"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["divergence"] == pytest.approx(theirs["divergence"], rel=1e-5)


@pytest.mark.parametrize("at", [1, 3, 5])
def test_an_interrupted_distillation_resumes_to_the_bit(
    tmp_path: Path, data: Path, tiny_model: Path, logits: Path, at: int
) -> None:
    train(taught(data, tiny_model, tmp_path / "whole", logits, dropout=0.1))
    config = taught(data, tiny_model, tmp_path / "cut", logits, dropout=0.1)
    with pytest.raises(KeyboardInterrupt):
        train(config, AtStep(at, lambda: signal.raise_signal(signal.SIGINT)))
    train(config)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_other_logits_make_another_run(
    tmp_path: Path, data: Path, tiny_model: Path, teacher: Path, logits: Path
) -> None:
    train(taught(data, tiny_model, tmp_path / "run", logits, epochs=1))
    other = tmp_path / "other"
    write_logits(LogitsConfig(data=data, teacher=str(teacher), top_k=3, out=other))
    with pytest.raises(OccupiedError, match=r"holds another run\. Different: the teacher \("):
        train(taught(data, tiny_model, tmp_path / "run", other, epochs=1))
    # The same ones from elsewhere are the same.
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in logits.iterdir():
        if path.is_file():
            (moved / path.name).write_bytes(path.read_bytes())
    assert train(taught(data, tiny_model, tmp_path / "run", moved, epochs=1)).status == "finished"


@pytest.mark.parametrize("kind", ["forward-kl", "reverse-kl", "jsd"])
@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_torch_learns_the_same(
    tmp_path: Path, data: Path, tiny_model: Path, logits: Path, kind: str, weight: float
) -> None:
    changes = {"distill": kind, "distill_weight": weight, "distill_temperature": 1.7, "epochs": 3}
    train(taught(data, tiny_model, tmp_path / "mlx", logits, **changes))
    train(taught(data, tiny_model, tmp_path / "torch", logits, backend="torch", device="cpu", **changes))
    ours, theirs = metrics(tmp_path / "mlx"), metrics(tmp_path / "torch")
    assert len(ours) > 12
    for a, b in zip(ours, theirs, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["divergence"] == pytest.approx(b["divergence"], rel=1e-4, abs=1e-7)
        assert a["token_accuracy"] == b["token_accuracy"]
    assert math.isfinite(ours[-1]["divergence"])
