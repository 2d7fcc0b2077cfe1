"""What training will take of the memory, and how batches are computed so that it fits.

A backend measures a few small batches, none larger than the room there is. What a batch takes grows with its tokens
and, where attention keeps its scores, with their square, so three measurements say what any batch takes. Of these ways
the first that fits is taken: whole batches; fewer rows at once, down to one (the update is the same); the same with
gradient checkpointing, which computes each trained layer twice. What is left over may hold what the frozen layers give.

A teacher that is in memory beside the student reads one row at a time, and the student writes as many answers at once
as fit. Neither is under way while the student learns, so that not their sum counts but the most of the three.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_distill.backends.base import Memory, Student
from mlx_distill.batches import Batch, make_batch, padded_width
from mlx_distill.config import TrainConfig, size_in_bytes
from mlx_distill.dataset import TokenSplit
from mlx_distill.errors import ResourceError
from mlx_distill.run_records import MemoryPlan, PrefixPlace
from mlx_distill.training.measuring import Growth, measure_growth, measure_longest
from mlx_distill.training.teaching import KEPT_BYTES, Teaching

#: Share of the limit left free for what is not measured: the interpreter's own growth, and fragments.
_SLACK = 0.05

#: Share of a disk's free space that kept rows may take.
_DISK_SHARE = 0.5

#: Positions by which mlx-lm lets a cache grow.
_CACHE_STEP = 256

_WAYS = {"auto": (False, True), "off": (False,), "on": (True,)}


@dataclass(frozen=True)
class Tokens:
    """How much there is to train on.

    Attributes:
        longest: Tokens of the longest row.
        trained: Of all training rows.
        evaluated: Of the rows that are evaluated again and again.
        evaluated_targets: Of these, how many carry loss.
        prompt: Of the longest prompt that the student writes an answer to; 0 where it writes none.
        answer: Of its longest answer.
    """

    longest: int
    trained: int
    evaluated: int
    evaluated_targets: int = 0
    prompt: int = 0
    answer: int = 0

    @property
    def width(self) -> int:
        """What the longest row is padded to, the student's own ones among them."""
        return padded_width(max(self.longest, self.prompt + self.answer))


def plan_memory(
    student: Student,
    config: TrainConfig,
    tokens: Tokens,
    folder: Path,
    *,
    processes: int = 1,
    teaching: Teaching | None = None,
) -> MemoryPlan:
    """Measure, and choose.

    Args:
        student: Before its first step.
        config: Of the run.
        tokens: Of the data.
        folder: Where kept rows may be written.
        processes: That share each batch.
        teaching: The teacher, where there is one.

    Raises:
        ResourceError: Not even one row at a time fits into `memory_limit`, or one row that the teacher reads, or one
            answer.
    """
    memory = student.memory()
    limit = _limit(memory, config)
    room = int(limit * (1 - _SLACK)) - memory.held
    if config.memory_limit is not None and (room <= 0 or student.peak_memory_bytes() > limit):
        raise _no_room(config, max(memory.held, student.peak_memory_bytes()))
    share = -(-config.batch_size // processes)
    wanted = min(config.micro_batch_size or share, share)
    least = 1 if config.micro_batch_size is None else wanted
    plan = None
    for checkpointing in _WAYS[config.gradient_checkpointing]:
        growth = measure_growth(student, tokens.width, room, checkpointing=checkpointing)
        rows = max((n for n in range(least, wanted + 1) if growth.bytes(n, tokens.width) <= room), default=0)
        plan = _plan(memory, limit, growth, rows or least, tokens.width, checkpointing=checkpointing)
        if rows:
            break
    else:
        assert plan is not None
        if config.memory_limit is not None:
            raise _too_small(plan, config, tokens)
    if teaching is not None and teaching.weights_bytes:
        scoring = measure_longest(teaching.measure, tokens.width, room)
        plan = plan.model_copy(update={"teacher_bytes": teaching.weights_bytes, "scoring_bytes": scoring})
    if tokens.prompt:
        rows, taken = _writing(student, tokens, share, room)
        own = {"writing_rows": rows, "writing_width": tokens.prompt + tokens.answer, "writing_bytes": taken}
        plan = plan.model_copy(update=own)
    if config.memory_limit is not None and busiest_bytes(plan) > room:
        raise _too_small_beside(plan, config, tokens, memory.held)
    return _with_cache(plan, memory, student, config, tokens, folder, teaching)


def with_cache(
    plan: MemoryPlan,
    student: Student,
    config: TrainConfig,
    tokens: Tokens,
    folder: Path,
    teaching: Teaching | None = None,
) -> MemoryPlan:
    """The plan of a run that goes on, with what is kept decided by the settings, the memory and the disk of now.

    Args:
        plan: How batches are computed, which is left as it is.
        student, config, tokens, folder, teaching: See `plan_memory`.
    """
    return _with_cache(plan, student.memory(), student, config, tokens, folder, teaching)


def _with_cache(
    plan: MemoryPlan,
    memory: Memory,
    student: Student,
    config: TrainConfig,
    tokens: Tokens,
    folder: Path,
    teaching: Teaching | None,
) -> MemoryPlan:
    limit = _limit(memory, config)
    left = int(limit * (1 - _SLACK)) - memory.held - busiest_bytes(plan)
    said = min(KEPT_BYTES, 0 if teaching is None else tokens.evaluated_targets * teaching.position_bytes, max(left, 0))
    place, kept = _prefix(student, config, tokens, left - said, folder)
    peak = memory.held + busiest_bytes(plan) + said + (kept if place == "memory" else 0)
    peak = max(peak, student.peak_memory_bytes())
    found = {"said_bytes": said, "prefix_cache": place, "prefix_bytes": kept, "peak_bytes": peak, "limit_bytes": limit}
    return plan.model_copy(update=found)


def _limit(memory: Memory, config: TrainConfig) -> int:
    return memory.available if config.memory_limit is None else size_in_bytes(config.memory_limit)


def busiest_bytes(plan: MemoryPlan) -> int:
    """What training, scoring or writing takes beyond what is held all the time: the most of the three."""
    return max(plan.activation_bytes, plan.scoring_bytes, plan.writing_bytes)


def rows_at_once(plan: MemoryPlan, rows: int, width: int) -> int:
    """How many of a batch's rows to compute at once.

    Args:
        plan: Of the run: what fits of its widest batch sets the room for all.
        rows: Of the batch.
        width: What they are padded to.
    """
    growth = Growth(plan.fixed_bytes, plan.token_bytes, plan.square_bytes)
    most = max((n for n in range(1, rows + 1) if growth.bytes(n, width) <= plan.activation_bytes), default=1)
    return _even(rows, most)


def answers_at_once(plan: MemoryPlan, rows: int, width: int) -> int:
    """How many answers the student writes at once; each is the same whatever is written beside it, but for rounding.

    Args:
        plan: Of the run: what fits of its longest sets the room for all.
        rows: To be written.
        width: Tokens of the longest prompt among them, and of its answer.
    """
    if plan.writing_rows is None or plan.writing_width is None:
        return rows
    most = plan.writing_rows * _cached(plan.writing_width) // _cached(width)
    return _even(rows, max(1, min(most, rows)))


def _even(rows: int, most: int) -> int:
    # As even as can be: three rows of four at once would leave one alone.
    return -(-rows // -(-rows // most))


def _cached(width: int) -> int:
    """Positions that a cache of so many tokens has."""
    return -(-width // _CACHE_STEP) * _CACHE_STEP


def micro_batches(plan: MemoryPlan, split: TokenSplit, rows: Sequence[int]) -> list[Batch]:
    """Rows of a split as they are computed: padded, and as many at once as fit. Of no rows there are none."""
    if not rows:
        return []
    size = rows_at_once(plan, len(rows), padded_width(int(split.lengths[rows].max())))
    return [make_batch(split.rows, rows[at : at + size]) for at in range(0, len(rows), size)]


def describe(plan: MemoryPlan) -> str:
    """The plan in one sentence."""
    parts = [
        (plan.weights_bytes, "weights"),
        (plan.optimizer_bytes, "adapter and optimizer"),
        (plan.teacher_bytes, "teacher"),
        _busiest(plan),
        (plan.said_bytes, "what the teacher said"),
        (plan.prefix_bytes if plan.prefix_cache == "memory" else 0, "kept rows of the frozen layers"),
    ]
    rest = plan.peak_bytes - sum(size for size, _ in parts)
    terms = [f"{size / 1e9:.2f} {what}" for size, what in [*parts, (rest, "else")] if size > 5e6]
    ways = [f"{_counted(plan.micro_batch_size)} at once"]
    if plan.writing_rows is not None:
        ways.append(f"{_counted(plan.writing_rows, 'answer')} written at once")
    ways += ["gradient checkpointing"] * plan.checkpointing
    if plan.prefix_cache == "disk":
        ways.append(f"{plan.prefix_bytes / 1e9:.2f} GB of kept rows on disk")
    return (
        f"Memory: {plan.peak_bytes / 1e9:.2f} GB at most of {plan.limit_bytes / 1e9:.1f} GB "
        f"({' + '.join(terms)}); {', '.join(ways)}."
    )


def _busiest(plan: MemoryPlan) -> tuple[int, str]:
    phases = [
        (plan.activation_bytes, "activations"),
        (plan.scoring_bytes, "the teacher's reading"),
        (plan.writing_bytes, "the student's writing"),
    ]
    return max(phases, key=lambda phase: phase[0])


def _writing(student: Student, tokens: Tokens, share: int, room: int) -> tuple[int, int]:
    """How many of the longest answers are written at once, and the bytes that it takes."""
    whole = tokens.prompt + tokens.answer

    def measure(width: int) -> int:
        prompt = max(1, tokens.prompt * width // whole)
        return student.measure_writing(1, prompt, width - prompt)

    one = measure_longest(measure, whole, room)
    if share == 1 or 2 * one > room:
        return 1, one
    more = max(1, student.measure_writing(2, tokens.prompt, tokens.answer) - one)
    rows = min(share, 1 + (room - one) // more)
    return rows, one + (rows - 1) * more


def _plan(memory: Memory, limit: int, growth: Growth, rows: int, width: int, *, checkpointing: bool) -> MemoryPlan:
    activations = growth.bytes(rows, width)
    return MemoryPlan(
        limit_bytes=limit,
        weights_bytes=memory.weights,
        optimizer_bytes=memory.optimizer,
        activation_bytes=activations,
        peak_bytes=memory.held + activations,
        fixed_bytes=growth.fixed,
        token_bytes=growth.token,
        square_bytes=growth.square,
        micro_batch_size=rows,
        checkpointing=checkpointing,
    )


def _prefix(
    student: Student, config: TrainConfig, tokens: Tokens, room: int, folder: Path
) -> tuple[PrefixPlace | None, int]:
    """Where what the frozen layers give is kept, and how many bytes of it at most."""
    # A training row that is seen once is not seen again.
    kept = tokens.evaluated + (tokens.trained if config.epochs > 1 else 0)
    total = kept * student.prefix_token_bytes
    free = int(shutil.disk_usage(folder).free * _DISK_SHARE)
    if config.prefix_cache == "off" or not total:
        return None, 0
    if config.prefix_cache == "disk" or (config.prefix_cache == "auto" and total > room and free >= total):
        return "disk", min(total, free)
    return ("memory", min(total, room)) if room > 0 else (None, 0)


def _counted(count: int, what: str = "row") -> str:
    return f"1 {what}" if count == 1 else f"{count} {what}s"


def _no_room(config: TrainConfig, taken: int) -> ResourceError:
    loaded = "student and teacher were" if config.teacher_online else "the model was"
    hints = ["a smaller or a 4-bit base model", *_teacher_advice(config)]
    return ResourceError(
        f"--memory-limit {config.memory_limit} is not enough: {taken / 1e9:.2f} GB were in use when {loaded} loaded.",
        hint=f"Raise it, or try {', '.join(hints)}.",
    )


def _too_small(plan: MemoryPlan, config: TrainConfig, tokens: Tokens) -> ResourceError:
    hints = list(_advice(plan, config, tokens))
    return ResourceError(
        f"--memory-limit {config.memory_limit} is not enough: {_counted(plan.micro_batch_size)} of "
        f"{max(tokens.longest, tokens.prompt + tokens.answer)} tokens take up to {plan.peak_bytes / 1e9:.2f} GB"
        + (", with gradient checkpointing" if plan.checkpointing else "")
        + f" ({plan.activation_bytes / 1e9:.2f} GB of it activations).",
        hint=f"Raise it, or try {', '.join(hints)}.",
    )


def _too_small_beside(plan: MemoryPlan, config: TrainConfig, tokens: Tokens, held: int) -> ResourceError:
    """Of scoring or writing, where training fits."""
    taken, what = _busiest(plan)
    if taken == plan.writing_bytes:
        size = f"one answer of {tokens.answer} tokens to a prompt of {tokens.prompt} takes"
        hints = [f"--on-policy-tokens {tokens.answer // 2}"] if tokens.answer > 1 else []
    else:
        size = f"the teacher, which reads a row of {max(tokens.longest, tokens.prompt + tokens.answer)} tokens, takes"
        hints = list(_length_advice(tokens))
    hints += _teacher_advice(config)
    return ResourceError(
        f"--memory-limit {config.memory_limit} is not enough: {size} up to {(held + taken) / 1e9:.2f} GB "
        f"({taken / 1e9:.2f} GB of it {what}).",
        hint=f"Raise it, or try {', '.join(hints)}.",
    )


def _advice(plan: MemoryPlan, config: TrainConfig, tokens: Tokens) -> Iterator[str]:
    if not plan.checkpointing:
        yield "--gradient-checkpointing auto"
    if plan.micro_batch_size > 1:
        yield "--micro-batch-size 1"
    yield from _length_advice(tokens)
    yield from _teacher_advice(config)
    if plan.weights_bytes > plan.activation_bytes:
        yield "a 4-bit base model"
    if config.layers == "all" or config.layers > 4:
        yield "fewer --layers"


def _length_advice(tokens: Tokens) -> Iterator[str]:
    """What makes the longest row shorter."""
    if tokens.prompt + tokens.answer > tokens.longest:
        if tokens.answer > 1:
            yield f"--on-policy-tokens {max(tokens.answer // 2, 1)}"
    elif tokens.longest > 256:
        yield f"--max-length {tokens.longest // 2}"


def _teacher_advice(config: TrainConfig) -> Iterator[str]:
    if config.teacher_online is None:
        return
    yield "a 4-bit teacher"
    if not config.on_policy:
        yield "--teacher-logits, which  mlx-distill logits  writes, instead of --teacher-online"
