"""What training will take of the memory, and how batches are computed so that it fits.

A backend measures a few small batches, none larger than the room there is. What a batch takes grows with its tokens
and, where attention keeps its scores, with their square, so three measurements say what any batch takes. Of these ways
the first that fits is taken: whole batches; fewer rows at once, down to one (the update is the same); the same with
gradient checkpointing, which computes each trained layer twice. What is left over may hold what the frozen layers give.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_distill.backends.base import Memory, Student
from mlx_distill.batches import WIDTH_QUANTUM, Batch, make_batch, padded_width
from mlx_distill.config import TrainConfig, size_in_bytes
from mlx_distill.dataset import TokenSplit
from mlx_distill.errors import ResourceError
from mlx_distill.run_records import MemoryPlan, PrefixPlace

#: Positions from which on the head's share no longer grows with the batch, as it works in chunks.
_HEAD_SATURATED = 256

#: Share of the limit left free for what is not measured: the interpreter's own growth, and fragments.
_SLACK = 0.05

#: Share of a disk's free space that kept rows may take.
_DISK_SHARE = 0.5

_WAYS = {"auto": (False, True), "off": (False,), "on": (True,)}


@dataclass(frozen=True)
class Tokens:
    """How much there is to train on.

    Attributes:
        longest: Tokens of the longest row.
        trained: Of all training rows.
        evaluated: Of the rows that are evaluated again and again.
    """

    longest: int
    trained: int
    evaluated: int

    @property
    def width(self) -> int:
        """What the longest row is padded to."""
        return padded_width(self.longest)


def plan_memory(
    student: Student, config: TrainConfig, tokens: Tokens, folder: Path, *, processes: int = 1
) -> MemoryPlan:
    """Measure, and choose.

    Args:
        student: Before its first step.
        config: Of the run.
        tokens: Of the data.
        folder: Where kept rows may be written.
        processes: That share each batch.

    Raises:
        ResourceError: Not even one row at a time fits into `memory_limit`.
    """
    memory = student.memory()
    limit = memory.available if config.memory_limit is None else size_in_bytes(config.memory_limit)
    room = int(limit * (1 - _SLACK)) - memory.held
    if config.memory_limit is not None and (room <= 0 or student.peak_memory_bytes() > limit):
        raise _no_room(config.memory_limit, max(memory.held, student.peak_memory_bytes()))
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
    place, kept = _prefix(student, config, tokens, room - plan.activation_bytes, folder)
    peak = plan.peak_bytes + (kept if place == "memory" else 0)
    peak = max(peak, student.peak_memory_bytes())
    return plan.model_copy(update={"prefix_cache": place, "prefix_bytes": kept, "peak_bytes": peak})


def rows_at_once(plan: MemoryPlan, rows: int, width: int) -> int:
    """How many of a batch's rows to compute at once.

    Args:
        plan: Of the run: what fits of its widest batch sets the room for all.
        rows: Of the batch.
        width: What they are padded to.
    """
    growth = Growth(plan.fixed_bytes, plan.token_bytes, plan.square_bytes)
    most = max((n for n in range(1, rows + 1) if growth.bytes(n, width) <= plan.activation_bytes), default=1)
    # As even as can be: three rows of four at once would leave one alone.
    return -(-rows // -(-rows // most))


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
        (plan.activation_bytes, "activations"),
        (plan.prefix_bytes if plan.prefix_cache == "memory" else 0, "kept rows of the frozen layers"),
    ]
    rest = plan.peak_bytes - sum(size for size, _ in parts)
    terms = [f"{size / 1e9:.2f} {what}" for size, what in [*parts, (rest, "else")] if size > 5e6]
    ways = [f"{_counted(plan.micro_batch_size)} at once"]
    ways += ["gradient checkpointing"] * plan.checkpointing
    if plan.prefix_cache == "disk":
        ways.append(f"{plan.prefix_bytes / 1e9:.2f} GB of kept rows on disk")
    return (
        f"Memory: {plan.peak_bytes / 1e9:.2f} GB at most of {plan.limit_bytes / 1e9:.1f} GB "
        f"({' + '.join(terms)}); {', '.join(ways)}."
    )


@dataclass(frozen=True)
class Growth:
    """What a batch takes: fixed + N · token + N · T · square bytes, for N = B · T positions."""

    fixed: float
    token: float
    square: float

    def bytes(self, rows: int, width: int) -> int:
        """Of a batch (B, T)."""
        positions = rows * width
        return int(self.fixed + positions * (self.token + width * self.square))


def measure_growth(student: Student, width: int, room: int, *, checkpointing: bool) -> Growth:
    """Fit a backend's memory to three small batches: some rows, twice as many, and as many of twice the width.

    Args:
        student: Before its first step.
        width: Of the widest batch: there is no need to measure what never comes.
        room: Bytes that measuring may take. The very smallest batch is measured first, to know how many tokens fit.
        checkpointing: The way to measure.
    """
    least = student.measure(_batch(1, WIDTH_QUANTUM), checkpointing=checkpointing)
    if 4 * least > room:
        # Not even two such rows: each further token is taken to be as costly as these.
        return Growth(0.0, least / WIDTH_QUANTUM, 0.0)
    # Twice the width takes up to four times the memory.
    fitting = room * WIDTH_QUANTUM // (4 * max(least, 1))
    narrow = max(WIDTH_QUANTUM, min(width // 2, _HEAD_SATURATED, fitting) // WIDTH_QUANTUM * WIDTH_QUANTUM)
    rows = max(1, min(-(-_HEAD_SATURATED // narrow), fitting // narrow))
    shapes = [(rows, narrow), (2 * rows, narrow), (rows, 2 * narrow)]
    found = [student.measure(_batch(*shape), checkpointing=checkpointing) for shape in shapes]
    terms = np.array([[1, n * t, n * t * t] for n, t in shapes], dtype=np.float64)
    fixed, token, square = np.linalg.solve(terms, np.array(found, dtype=np.float64))
    if square < 0:
        # Nothing grows slower than its tokens; what looks so is the measurement's grain.
        square = 0.0
        token = (found[2] - found[0]) / (rows * narrow)
        fixed = found[0] - rows * narrow * token
    return Growth(max(fixed, 0.0), max(token, 0.0), square)


def _batch(rows: int, width: int) -> Batch:
    tokens = np.tile(np.arange(width, dtype=np.int32) % 8, (rows, 1))
    mask = np.ones((rows, width), dtype=np.bool_)
    mask[:, 0] = False
    return Batch(tokens, mask, np.full(rows, width, np.int32), np.arange(rows, dtype=np.int32))


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


def _counted(rows: int) -> str:
    return "1 row" if rows == 1 else f"{rows} rows"


def _no_room(limit: str, taken: int) -> ResourceError:
    return ResourceError(
        f"--memory-limit {limit} is not enough: {taken / 1e9:.2f} GB were in use when the model was loaded.",
        hint="Raise it, or try a smaller or a 4-bit base model.",
    )


def _too_small(plan: MemoryPlan, config: TrainConfig, tokens: Tokens) -> ResourceError:
    hints = list(_advice(plan, config, tokens))
    return ResourceError(
        f"--memory-limit {config.memory_limit} is not enough: {_counted(plan.micro_batch_size)} of {tokens.longest} "
        f"tokens take up to {plan.peak_bytes / 1e9:.2f} GB"
        + (", with gradient checkpointing" if plan.checkpointing else "")
        + f" ({plan.activation_bytes / 1e9:.2f} GB of it activations).",
        hint=f"Raise it, or try {', '.join(hints)}.",
    )


def _advice(plan: MemoryPlan, config: TrainConfig, tokens: Tokens) -> Iterator[str]:
    if not plan.checkpointing:
        yield "--gradient-checkpointing auto"
    if plan.micro_batch_size > 1:
        yield "--micro-batch-size 1"
    if tokens.longest > 256:
        yield f"--max-length {tokens.longest // 2}"
    if plan.weights_bytes > plan.activation_bytes:
        yield "a 4-bit base model"
    if config.layers == "all" or config.layers > 4:
        yield "fewer --layers"
