"""A teacher reads row by row, and the student writes in parts: the same comes out, and it takes what was planned."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_distill.backends.mlx import writing
from mlx_distill.backends.mlx.drawing import Sampling
from mlx_distill.backends.mlx.loading import load_frozen
from mlx_distill.backends.mlx.student import MlxStudent
from mlx_distill.backends.mlx.teaching import LogitTeacher
from mlx_distill.batches import Batch, TeacherBuckets, TokenRow, make_batch
from mlx_distill.layout import RunFolder
from mlx_distill.run_records import MemoryPlan
from mlx_distill.training import run as run_module
from mlx_distill.training.own_answers import own_batches
from mlx_distill.training.planning import plan_memory
from mlx_distill.training.run import train
from mlx_distill.training.teaching import OnlineTeacher
from tests.training.runs import ROOT, AtStep, chat, make_data, online, outcome

TOP_K = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write into it."""
    return make_data(tmp_path_factory.mktemp("taught") / "data")


def random_rows(count: int, longest: int = 60) -> list[TokenRow]:
    """The first half of a row is its prompt."""
    random = np.random.default_rng(7)
    rows = []
    for size in random.integers(4, longest, count):
        mask = np.arange(size) >= size // 2
        rows.append(TokenRow(random.integers(10, 300, size).astype(np.int32), mask))
    return rows


def same(a: TeacherBuckets, b: TeacherBuckets) -> bool:
    return bool(np.array_equal(a.ids, b.ids) and np.array_equal(a.log_probs, b.log_probs))


# Reading


def test_rows_read_alone_say_what_they_say_together(teacher: Path) -> None:
    """But for rounding: a product of more rows adds the same terms in another order."""
    model = LogitTeacher(teacher, dtype="float32", known=384)
    batch = make_batch(random_rows(5), range(5))
    alone = model.row_by_row(batch, range(5), TOP_K)
    together = model.likeliest(batch, TOP_K)
    assert [len(said.ids) for said in alone] == batch.loss_mask.sum(axis=1).tolist()
    assert np.array_equal(np.concatenate([said.ids for said in alone]), together.ids)
    # 64 sums of some hundred terms in float32.
    np.testing.assert_allclose(np.concatenate([s.log_probs for s in alone]), together.log_probs, rtol=0, atol=2e-5)


def test_what_is_said_of_a_row_does_not_depend_on_its_company(teacher: Path) -> None:
    """To the bit, so that the memory limit makes no difference to it."""
    rows = random_rows(6)
    asked = OnlineTeacher(teacher, "float32", 384)
    whole = asked.with_teacher("train", make_batch(rows, range(6))).teacher
    assert whole is not None
    for parts in ([[0], [1], [2], [3], [4], [5]], [[0, 1, 2, 3], [4, 5]]):
        found = [asked.with_teacher("train", make_batch(rows, part)).teacher for part in parts]
        ids, logs = (np.concatenate([getattr(said, name) for said in found]) for name in ("ids", "log_probs"))
        assert same(TeacherBuckets(ids, logs), whole)


def test_reading_a_batch_takes_no_more_than_its_longest_row(teacher: Path) -> None:
    model = LogitTeacher(teacher, dtype="float32", known=384)
    one = model.measure(480, TOP_K)
    tokens = np.arange(8 * 480, dtype=np.int32).reshape(8, 480) % 300
    mask = np.tile(np.arange(480) > 0, (8, 1))
    batch = Batch(tokens, mask, np.full(8, 480, np.int32), np.arange(8, dtype=np.int32))
    taken = []
    for read in (lambda: model.row_by_row(batch, range(8), TOP_K), lambda: model.likeliest(batch, TOP_K)):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        read()
        taken.append(mx.get_peak_memory() - before)
    # The last of the row before may not have been let go of yet.
    assert 0.8 * one < taken[0] < 1.25 * one
    assert taken[1] > 3 * one


class Reads:
    """Counts the rows that are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.rows = 0
        read = LogitTeacher.row_by_row

        def counted(teacher: LogitTeacher, batch: Batch, places: Sequence[int], top_k: int) -> list[TeacherBuckets]:
            self.rows += len(places)
            return read(teacher, batch, places, top_k)

        monkeypatch.setattr(LogitTeacher, "row_by_row", counted)


def test_what_was_said_of_validation_rows_is_said_again(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(6)
    asked = OnlineTeacher(teacher, "float32", 384)
    batches = [make_batch(rows, part) for part in ([0, 1, 2], [3, 4, 5])]
    first = [asked.with_teacher("valid", batch).teacher for batch in batches]
    sizes = [asked.position_bytes * row.target_tokens for row in rows]
    assert sum(sizes) == sum(said.ids.nbytes + said.log_probs.nbytes for said in first if said is not None)
    asked.keep(sum(sizes[:4]))
    reads = Reads(monkeypatch)
    for expected in (6, 6 + 2, 6 + 2 + 2):
        found = [asked.with_teacher("valid", batch).teacher for batch in batches]
        assert reads.rows == expected
        assert all(a is not None and b is not None and same(a, b) for a, b in zip(first, found, strict=True))
    # In other company, too; but other rows have the same numbers.
    asked.with_teacher("valid", make_batch(rows, [3, 0, 2]))
    assert reads.rows == 10
    asked.with_teacher("train", make_batch(rows, [3, 0, 2]))
    assert reads.rows == 13


def test_a_run_is_the_same_where_nothing_is_kept(
    tmp_path: Path, data: Path, tiny_model: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = Reads(monkeypatch)
    record = train(online(data, tiny_model, tmp_path / "kept", teacher))
    kept = reads.rows
    assert record.plan is not None and record.plan.said_bytes > 0
    assert record.plan.teacher_bytes == LogitTeacher(teacher, dtype="float32", known=384).weights_bytes
    monkeypatch.setattr("mlx_distill.training.planning.KEPT_BYTES", 0)
    record = train(online(data, tiny_model, tmp_path / "read", teacher))
    assert record.plan is not None and record.plan.said_bytes == 0
    # Three rows, at the two validations after the first.
    assert reads.rows - kept == kept + 2 * 3
    assert outcome(tmp_path / "kept") == outcome(tmp_path / "read")


# Writing


@pytest.mark.parametrize("size", [1, 2, 3])
def test_answers_written_in_parts_are_those_written_at_once(
    tmp_path: Path, data: Path, tiny_model: Path, size: int
) -> None:
    config = online(data, tiny_model, tmp_path / "run", tiny_model, on_policy=1.0, on_policy_tokens=30)
    student = MlxStudent(tiny_model, config)
    rows, chosen = random_rows(7), [4, 0, 3, 6, 2]
    asked: list[tuple[int, int]] = []

    def few(count: int, width: int) -> int:
        asked.append((count, width))
        return size

    whole, parts = (
        own_batches(student, rows, chosen, config, 2, 384, lambda count, width: count, at_once)
        for at_once in (lambda count, width: count, few)
    )
    prompts = [len(rows[row].tokens) - rows[row].target_tokens for row in chosen]
    assert asked == [(5, max(prompts) + 30)]
    assert len(whole) == len(parts) == 1
    assert whole[0].rows.tolist() == parts[0].rows.tolist() == chosen
    assert whole[0].tokens.tolist() == parts[0].tokens.tolist()
    assert np.array_equal(whole[0].loss_mask, parts[0].loss_mask)


@pytest.mark.parametrize(("rows", "prompt", "answer"), [(1, 30, 20), (4, 200, 100), (3, 20, 250), (2, 600, 10)])
def test_what_writing_takes_is_known_before(tiny_model: Path, rows: int, prompt: int, answer: int) -> None:
    """Answers of one length that no end mark cuts, until the last word."""
    model, _ = load_frozen(tiny_model, dtype="float32")
    planned = writing.measure(model, rows, prompt, answer)
    asked = [[token + 10 for token in range(prompt)]] * rows
    drawn = [Sampling(1.0, row) for row in range(rows)]
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    found = writing.write(model, asked, drawn, ends=(), max_tokens=answer)
    assert [len(tokens) for tokens in found] == [answer] * rows
    assert planned == pytest.approx(mx.get_peak_memory() - before, rel=0.25)


def test_a_run_that_goes_on_writes_in_the_same_parts(
    tmp_path: Path, data: Path, tiny_model: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan of a run is kept with it: another measurement, when it goes on, changes nothing."""

    def tight(*given: Any, **named: Any) -> MemoryPlan:
        return plan_memory(*given, **named).model_copy(update={"writing_rows": 1, "activation_bytes": 1})

    written: list[int] = []
    write = MlxStudent.write

    def counted(student: MlxStudent, prompts: Any, keys: Any, **named: Any) -> Any:
        written.append(len(prompts))
        return write(student, prompts, keys, **named)

    monkeypatch.setattr(MlxStudent, "write", counted)
    limited = {"on_policy": 0.5, "dropout": 0.1, "memory_limit": "8GB", "seed": 1}
    config = online(data, tiny_model, tmp_path / "cut", teacher, **limited)
    with monkeypatch.context() as patched:
        patched.setattr(run_module, "plan_memory", tight)
        train(online(data, tiny_model, tmp_path / "whole", teacher, **limited))
        with pytest.raises(KeyboardInterrupt):
            train(config, AtStep(3, lambda: signal.raise_signal(signal.SIGINT)))
    before = len(written)
    train(config)
    assert set(written) == {1} and len(written) > before
    ended = [outcome(tmp_path / name) for name in ("whole", "cut")]
    for _, rows, _ in ended:
        for row in rows:
            row.pop("writing_seconds", None), row.pop("scoring_seconds", None)
    assert ended[0] == ended[1]


# Planned and measured


def real_run(tmp_path: Path, name: str, model: Path, *options: str) -> tuple[MemoryPlan, dict[str, Any]]:
    """A training of a real model that is its own teacher, in a process of its own, as the peak is one a process."""
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    text = chat(0)["messages"][1]["content"]
    rows = [
        {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": f"{text} {at} " * 8}]}
        for at in range(4)
    ]
    for split in ("train", "valid"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = [sys.executable, "-m", "mlx_distill", "train", "--data", data, "--run", tmp_path / name]
    command += ["--model", model, "--teacher-online", f"mlx:{model}", "--distill", "reverse-kl"]
    command += ["--epochs", "1", "--batch-size", "4", "--layers", "4", *options]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(RunFolder(tmp_path / name).record.read_text(encoding="utf-8"))
    return MemoryPlan.model_validate(found["plan"]), found


@pytest.mark.slow
def test_the_plan_of_a_real_teacher_is_near_what_is_taken(tmp_path: Path, smollm2: Path) -> None:
    plan, record = real_run(tmp_path, "run", smollm2)
    assert plan.teacher_bytes > 500e6 and plan.scoring_bytes > 0
    assert plan.peak_bytes == pytest.approx(record["peak_memory_bytes"], rel=0.25)


@pytest.mark.slow
def test_the_plan_of_own_answers_is_near_what_is_taken(tmp_path: Path, smollm2: Path) -> None:
    """Of a run in which the student writes every answer."""
    own = ["--on-policy", "1.0", "--on-policy-tokens", "40"]
    plan, record = real_run(tmp_path, "free", smollm2, *own)
    assert plan.writing_rows == 4
    assert plan.peak_bytes == pytest.approx(record["peak_memory_bytes"], rel=0.25)
