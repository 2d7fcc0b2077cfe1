"""The memory plan: what it says is near what is measured, what it allows is kept to, and it changes no number."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.backends.base import Memory
from mlx_distill.batches import WIDTH_QUANTUM, Batch
from mlx_distill.config import TrainConfig
from mlx_distill.errors import ResourceError
from mlx_distill.layout import RunFolder
from mlx_distill.run_records import MemoryPlan
from mlx_distill.training.measuring import Growth, measure_growth, measure_longest
from mlx_distill.training.planning import Tokens, answers_at_once, describe, plan_memory, rows_at_once, with_cache
from mlx_distill.training.run import train
from tests.training.runs import ROOT, Recorder, chat, make_data, outcome, settings

MB = 10**6


@dataclass
class Machine:
    """Stands for a student whose memory is known: what planning makes of it is arithmetic.

    Attributes:
        cost: Bytes of a batch of (rows, width), checkpointed or not.
        held: Before the first step.
        most: The most that a measurement took.
        answer_cost: Bytes of one position of prompt or answer that is written.
    """

    cost: Callable[[int, int, bool], float]
    held: int = 500 * MB
    available: int = 16_000 * MB
    prefix_token_bytes: int = 2_000
    most: float = 0.0
    answer_cost: int = 0
    shapes: list[tuple[int, int]] = field(default_factory=list)

    def memory(self) -> Memory:
        return Memory(weights=400 * MB, optimizer=10 * MB, held=self.held, available=self.available)

    def measure(self, batch: Batch, *, checkpointing: bool) -> int:
        rows, width = batch.tokens.shape
        taken = self.cost(rows, width, checkpointing)
        self.most = max(self.most, taken)
        self.shapes.append((rows, width))
        return int(taken)

    def measure_writing(self, rows: int, prompt: int, answer: int) -> int:
        taken = 2 * MB + rows * (prompt + answer) * self.answer_cost
        self.most = max(self.most, taken)
        return taken

    def peak_memory_bytes(self) -> int:
        return self.held + int(self.most)


@dataclass
class Reader:
    """Stands for a teacher whose memory is known."""

    square: int = 0
    weights_bytes: int = 300 * MB
    position_bytes: int = 500

    def with_teacher(self, split: str, batch: Batch) -> Batch:
        raise AssertionError("nothing is read to make a plan")

    def measure(self, width: int) -> int:
        return 20 * MB + width * width * self.square

    def keep(self, size: int) -> None:
        raise AssertionError("a plan keeps nothing")


def quadratic(rows: int, width: int, checkpointing: bool) -> float:
    """Like a model whose attention keeps its scores."""
    return 5 * MB + rows * width * (100_000 + 200 * width) * (0.3 if checkpointing else 1)


def linear(rows: int, width: int, checkpointing: bool) -> float:
    return rows * width * 500_000 * (0.25 if checkpointing else 1)


def config(tmp_path: Path, **changes: Any) -> TrainConfig:
    return settings(tmp_path, tmp_path, tmp_path / "run", **{"batch_size": 4, **changes})


def plan_of(machine: Machine, tmp_path: Path, longest: int = 800, **changes: Any) -> Any:
    tokens = Tokens(longest=longest, trained=100_000, evaluated=10_000)
    return plan_memory(machine, config(tmp_path, **changes), tokens, tmp_path)  # type: ignore[arg-type]


def taught_plan(machine: Machine, tmp_path: Path, reader: Reader, *, answer: int = 0, **changes: Any) -> Any:
    """Of a teacher in memory, and of answers to prompts of 300 tokens where there are any."""
    values = {"distill": "jsd", "teacher_online": "mlx:x", "prefix_cache": "off", **changes}
    values |= {"on_policy": 0.5, "on_policy_tokens": answer} if answer else {}
    written = {"prompt": 300, "answer": answer} if answer else {}
    tokens = Tokens(longest=800, trained=100_000, evaluated=10_000, evaluated_targets=6_000, **written)
    return plan_memory(machine, config(tmp_path, **values), tokens, tmp_path, teaching=reader)  # type: ignore[arg-type]


@pytest.mark.parametrize("cost", [quadratic, linear])
@pytest.mark.parametrize("width", [WIDTH_QUANTUM, 96, 304, 2048])
def test_what_a_batch_takes_is_known_from_small_ones(cost: Callable[..., float], width: int) -> None:
    machine = Machine(cost)
    growth = measure_growth(machine, width, 16_000 * MB, checkpointing=False)  # type: ignore[arg-type]
    for rows in (1, 3, 8):
        assert growth.bytes(rows, width) == pytest.approx(cost(rows, width, False), rel=1e-3)
    assert all(rows * at <= 2 * (256 + width) for rows, at in machine.shapes)


@pytest.mark.parametrize("room_mb", [1, 10, 33, 64, 100, 300, 1000])
@pytest.mark.parametrize("cost", [quadratic, linear])
def test_measuring_keeps_to_the_room_that_there_is(cost: Callable[..., float], room_mb: int) -> None:
    machine = Machine(cost)
    growth = measure_growth(machine, 800, room_mb * MB, checkpointing=False)  # type: ignore[arg-type]
    smallest = cost(1, WIDTH_QUANTUM, False)
    assert machine.most <= max(room_mb * MB, smallest)
    # What was not measured is not thought to be smaller than it is where there was room to see it.
    if room_mb >= 300:
        assert growth.bytes(2, 800) == pytest.approx(cost(2, 800, False), rel=0.02)


def test_the_first_way_that_fits_is_taken(tmp_path: Path) -> None:
    """Whole batches; fewer rows; checkpointing; and with each smaller limit no more memory than with the larger."""
    found = []
    for limit in ("16GB", "2.3GB", "1.5GB", "1.1GB", "720MB"):
        plan = plan_of(Machine(linear), tmp_path, memory_limit=limit)
        assert plan.peak_bytes <= plan.limit_bytes
        found.append((plan.micro_batch_size, plan.checkpointing))
    assert found == [(4, False), (4, False), (2, False), (1, False), (1, True)]


@pytest.mark.parametrize("limit", ["600MB", "520MB", "400MB"])
def test_a_limit_that_nothing_fits_into_is_an_error(tmp_path: Path, limit: str) -> None:
    with pytest.raises(ResourceError, match=f"--memory-limit {limit} is not enough") as caught:
        plan_of(Machine(linear), tmp_path, memory_limit=limit)
    assert caught.value.hint


def test_without_a_limit_the_best_way_is_tried_on_a_machine_that_is_too_small(tmp_path: Path) -> None:
    plan = plan_of(Machine(linear, available=600 * MB), tmp_path)
    assert (plan.micro_batch_size, plan.checkpointing) == (1, True)


def test_what_the_user_chose_is_not_changed(tmp_path: Path) -> None:
    assert plan_of(Machine(linear), tmp_path, micro_batch_size=2).micro_batch_size == 2
    assert plan_of(Machine(linear), tmp_path, gradient_checkpointing="on").checkpointing
    with pytest.raises(ResourceError, match="--micro-batch-size 1"):
        plan_of(Machine(linear), tmp_path, micro_batch_size=4, memory_limit="900MB")
    with pytest.raises(ResourceError, match="--gradient-checkpointing auto"):
        plan_of(Machine(linear), tmp_path, gradient_checkpointing="off", memory_limit="700MB")


def test_kept_rows_take_what_is_left_over(tmp_path: Path) -> None:
    wanted = 110_000 * 2_000
    plan = plan_of(Machine(linear), tmp_path)
    assert (plan.prefix_cache, plan.prefix_bytes) == ("memory", wanted)
    assert plan_of(Machine(linear), tmp_path, epochs=1).prefix_bytes == 10_000 * 2_000
    tight = plan_of(Machine(linear), tmp_path, memory_limit="2.3GB")
    assert tight.prefix_cache == "disk"
    bounded = plan_of(Machine(linear), tmp_path, memory_limit="2.3GB", prefix_cache="memory")
    assert bounded.prefix_cache == "memory"
    assert bounded.prefix_bytes < wanted
    assert bounded.peak_bytes <= bounded.limit_bytes
    assert plan_of(Machine(linear), tmp_path, prefix_cache="off").prefix_cache is None
    assert plan_of(Machine(linear, prefix_token_bytes=0), tmp_path).prefix_cache is None


def test_the_sentence_adds_up(tmp_path: Path) -> None:
    assert describe(plan_of(Machine(linear), tmp_path)) == (
        "Memory: 2.32 GB at most of 16.0 GB (0.40 weights + 0.01 adapter and optimizer + 1.60 activations "
        "+ 0.22 kept rows of the frozen layers + 0.09 else); 4 rows at once."
    )


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("width", [16, 160, 800])
def test_rows_at_once_fit_and_are_even(tmp_path: Path, rows: int, width: int) -> None:
    plan = plan_of(Machine(quadratic), tmp_path, memory_limit="1.2GB", batch_size=8)
    size = rows_at_once(plan, rows, width)
    assert 1 <= size <= rows
    growth = Growth(plan.fixed_bytes, plan.token_bytes, plan.square_bytes)
    assert growth.bytes(size, width) <= plan.activation_bytes
    parts = -(-rows // size)
    assert parts * size - rows < size
    # One part fewer would not fit.
    assert parts == 1 or growth.bytes(-(-rows // (parts - 1)), width) > plan.activation_bytes


# A teacher beside the student, and the student's own answers


@pytest.mark.parametrize("room_mb", [1, 20, 50, 100, 1000, 10_000])
@pytest.mark.parametrize("square", [0, 100, 3_000])
@pytest.mark.parametrize("width", [WIDTH_QUANTUM, 48, 800, 2_000])
def test_the_longest_row_is_measured_where_there_is_room(room_mb: int, square: int, width: int) -> None:
    taken: list[int] = []

    def measure(at: int) -> int:
        taken.append(20 * MB + at * at * square)
        return taken[-1]

    found = measure_longest(measure, width, room_mb * MB)
    actual = 20 * MB + width * width * square
    assert max(taken) <= max(room_mb * MB, 20 * MB + WIDTH_QUANTUM**2 * square)
    # Never too little; and measured, where the room is that of the worst that the smallest row lets be feared.
    assert found >= actual
    if room_mb * MB >= 4 * actual:
        assert found == actual


def test_what_does_not_happen_at_once_is_not_added_up(tmp_path: Path) -> None:
    machine = Machine(linear, answer_cost=20_000)
    plan = taught_plan(machine, tmp_path, Reader(square=5_000), answer=200)
    assert plan.activation_bytes == 4 * 800 * 500_000
    assert plan.scoring_bytes == 20 * MB + 800 * 800 * 5_000
    assert plan.writing_bytes == 2 * MB + 4 * 500 * 20_000
    assert (plan.teacher_bytes, plan.said_bytes) == (300 * MB, 6_000 * 500)
    # The teacher's weights are held already.
    assert plan.peak_bytes == machine.held + plan.scoring_bytes + plan.said_bytes
    assert describe(plan) == (
        "Memory: 3.72 GB at most of 16.0 GB (0.40 weights + 0.01 adapter and optimizer + 0.30 teacher "
        "+ 3.22 the teacher's reading); 4 rows at once, 4 answers written at once."
    )


def test_fewer_answers_are_written_at_once_under_a_limit(tmp_path: Path) -> None:
    """And with each smaller limit no more memory is taken than with the larger."""
    found = []
    for limit in ("16GB", "2.3GB", "1.5GB", "1.1GB"):
        plan = taught_plan(Machine(linear, answer_cost=400_000), tmp_path, Reader(), answer=700, memory_limit=limit)
        assert plan.peak_bytes <= plan.limit_bytes
        assert plan.writing_bytes == 2 * MB + plan.writing_rows * 1_000 * 400_000
        found.append(plan.writing_rows)
    assert found == [4, 4, 2, 1]


def test_own_answers_may_be_the_longest_rows(tmp_path: Path) -> None:
    short = taught_plan(Machine(linear), tmp_path, Reader(), answer=100)
    long = taught_plan(Machine(linear), tmp_path, Reader(), answer=900)
    assert (short.activation_bytes, long.activation_bytes) == (4 * 800 * 500_000, 4 * 1200 * 500_000)
    assert long.writing_width == 1200


@pytest.mark.parametrize("rows", [1, 3, 4, 7])
@pytest.mark.parametrize("width", [40, 256, 300, 999, 1000])
def test_answers_at_once_fit_and_are_even(tmp_path: Path, rows: int, width: int) -> None:
    plan = taught_plan(Machine(linear, answer_cost=400_000), tmp_path, Reader(), answer=700, memory_limit="1.5GB")
    size = answers_at_once(plan, rows, width)

    def positions(count: int) -> int:
        return count * (-(-width // 256) * 256)

    parts = -(-rows // size)
    assert positions(size) <= 2 * 1024
    assert 1 <= size <= rows and parts * size - rows < size
    assert parts == 1 or positions(-(-rows // (parts - 1))) > 2 * 1024
    # A run that an earlier version began wrote all at once.
    assert answers_at_once(plan.model_copy(update={"writing_rows": None}), rows, width) == rows


@pytest.mark.parametrize(
    ("reader", "answer", "limit", "said", "hints"),
    [
        (Reader(), 700, "920MB", "one answer of 700 tokens to a prompt of 300 takes", ["--on-policy-tokens 350"]),
        (Reader(square=900), 0, "1.1GB", "the teacher, which reads a row of 800 tokens", ["--teacher-logits", "4-bit"]),
        (Reader(square=900), 700, "1.3GB", "the teacher, which reads a row of 1000", ["--on-policy-tokens 350"]),
        (Reader(), 0, "560MB", "1 row of 800 tokens take", ["a 4-bit teacher", "--teacher-logits"]),
        (Reader(), 0, "400MB", "when student and teacher were loaded", ["a 4-bit teacher", "--teacher-logits"]),
    ],
)
def test_what_does_not_fit_beside_training_is_named(
    tmp_path: Path, reader: Reader, answer: int, limit: str, said: str, hints: list[str]
) -> None:
    machine = Machine(linear, answer_cost=400_000)
    with pytest.raises(ResourceError, match=f"--memory-limit {limit} is not enough: .*{said}") as caught:
        taught_plan(machine, tmp_path, reader, answer=answer, memory_limit=limit)
    assert caught.value.hint is not None
    assert all(hint in caught.value.hint for hint in hints)
    # Nobody knows before what the student will write.
    assert ("--teacher-logits" in caught.value.hint) is (not answer)


def test_what_the_teacher_said_is_kept_where_there_is_room(tmp_path: Path) -> None:
    assert taught_plan(Machine(linear), tmp_path, Reader(position_bytes=10**6)).said_bytes == 256 << 20
    tight = taught_plan(Machine(linear), tmp_path, Reader(position_bytes=10**6), memory_limit="1.1GB")
    assert 0 <= tight.said_bytes < 256 << 20
    assert tight.peak_bytes <= tight.limit_bytes
    assert taught_plan(Machine(linear), tmp_path, Reader(position_bytes=0)).said_bytes == 0


def test_the_plan_of_an_earlier_version_loads(tmp_path: Path) -> None:
    plan = plan_of(Machine(linear), tmp_path)
    later = {"teacher_bytes", "scoring_bytes", "said_bytes", "writing_bytes", "writing_rows", "writing_width"}
    assert MemoryPlan.model_validate_json(plan.model_dump_json(exclude=later)) == plan


@pytest.mark.parametrize("place", ["memory", "disk", "off"])
def test_where_rows_are_kept_changes_no_number(tmp_path: Path, tiny_model: Path, place: str) -> None:
    data = make_data(tmp_path / "data")
    found = []
    for name, chosen in (("auto", "auto"), ("chosen", place)):
        run = tmp_path / name
        record = train(settings(data, tiny_model, run, prefix_cache=chosen))
        assert record.plan is not None
        found.append(outcome(run))
        found[-1][2]["config"].pop("prefix_cache")
    assert record.plan.prefix_cache == (None if place == "off" else place)
    assert found[0] == found[1]
    assert not [path for path in (tmp_path / "chosen").iterdir() if path.name.startswith("frozen")]


def test_what_is_kept_is_decided_anew_and_nothing_else(tmp_path: Path) -> None:
    """Of the room that the run's own batches leave, whatever would be planned now."""
    planned = plan_of(Machine(linear), tmp_path, memory_limit="2.5GB")
    assert (planned.micro_batch_size, planned.prefix_cache) == (4, "memory")

    def again(held: int = 500, **changes: Any) -> MemoryPlan:
        tokens = Tokens(longest=800, trained=100_000, evaluated=10_000)
        machine = Machine(linear, held=held * MB)
        found = with_cache(planned, machine, config(tmp_path, **changes), tokens, tmp_path)  # type: ignore[arg-type]
        anew = {"prefix_cache", "prefix_bytes", "peak_bytes", "limit_bytes"}
        assert found.model_dump(exclude=anew) == planned.model_dump(exclude=anew)
        assert not machine.shapes  # nothing is measured for it
        return found

    assert again(memory_limit="2.5GB") == planned
    assert again(held=700, memory_limit="2.5GB").prefix_cache == "disk"
    assert again(prefix_cache="disk").prefix_cache == "disk"
    assert again(prefix_cache="off").prefix_bytes == 0
    # No room at all is no reason not to go on.
    assert again(memory_limit="1MB", prefix_cache="memory").prefix_cache is None


def test_a_run_that_goes_on_keeps_its_plan(tmp_path: Path, tiny_model: Path) -> None:
    """Fewer rows at once give the same update but for rounding; exact resume wants the same bits."""
    data, run = make_data(tmp_path / "data"), tmp_path / "run"
    base = settings(data, tiny_model, run, memory_limit="8GB")
    record = train(base)
    assert record.plan is not None
    marked = record.plan.model_copy(update={"micro_batch_size": 1, "activation_bytes": 1})
    going = record.model_copy(update={"plan": marked, "status": "running"})
    RunFolder(run).record.write_text(going.model_dump_json(), encoding="utf-8")
    anew = {"said_bytes", "prefix_cache", "prefix_bytes", "peak_bytes"}
    kept = train(base).plan
    assert kept is not None
    assert kept.model_dump(exclude=anew) == marked.model_dump(exclude=anew)
    RunFolder(run).record.write_text(going.model_dump_json(), encoding="utf-8")
    other = train(settings(data, tiny_model, run, memory_limit="9GB"), watcher := Recorder())
    assert other.plan is not None
    assert other.plan != marked
    assert any("of 9.0 GB" in line for line in watcher.said)


@pytest.mark.slow
def test_the_plan_is_near_what_a_real_model_takes_and_a_limit_is_kept(tmp_path: Path, smollm2: Path) -> None:
    """In processes of their own, as the peak is one a process; half of the room leaves the losses as they were."""
    data = tmp_path / "data"
    data.mkdir()
    text = chat(0)["messages"][1]["content"]
    rows = [
        {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": f"{text} {at} " * 16}]}
        for at in range(4)
    ]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def run(name: str, *options: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "mlx_distill", "train", "--data", data, "--run", tmp_path / name]
        command += ["--model", smollm2, "--epochs", "1", "--batch-size", "4", "--layers", "8", *options]
        done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(RunFolder(tmp_path / name).record.read_text(encoding="utf-8"))
        return found

    free = run("free")
    assert free["plan"]["peak_bytes"] == pytest.approx(free["peak_memory_bytes"], rel=0.25)
    room = free["plan"]["peak_bytes"] - free["plan"]["activation_bytes"]
    limit = (room + free["plan"]["activation_bytes"] // 2) // MB
    tight = run("tight", "--memory-limit", f"{limit}MB")
    assert tight["peak_memory_bytes"] <= limit * MB
    assert tight["peak_memory_bytes"] < free["peak_memory_bytes"]
    assert tight["plan"]["peak_bytes"] == pytest.approx(tight["peak_memory_bytes"], rel=0.25)
    assert tight["train_loss"] == pytest.approx(free["train_loss"], rel=1e-5)
