"""What a batch takes of the memory, known from small ones.

What is measured is never larger than the room there is. What a batch takes grows with its tokens and, where attention
keeps its scores, with their square.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mlx_distill.backends.base import Student
from mlx_distill.batches import WIDTH_QUANTUM, Batch

#: Positions from which on the head's share no longer grows with the batch, as it works in chunks.
_HEAD_SATURATED = 256


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


def measure_longest(measure: Callable[[int], int], width: int, room: int) -> int:
    """Bytes of one row of a width: measured, or, where there may be no room for that, grown from what was.

    Args:
        measure: Of one row of a width; what it takes grows with the square of the width at most.
        width: Of the longest row.
        room: Bytes that measuring may take, but for that of the smallest row.
    """
    at = min(width, WIDTH_QUANTUM)
    taken = measure(at)
    while at < width:
        further = min(width, math.isqrt(max(room, 0) * at * at // max(taken, 1)))
        if further <= at:
            return taken * width * width // (at * at)
        at, taken = further, measure(further)
    return taken


def _batch(rows: int, width: int) -> Batch:
    tokens = np.tile(np.arange(width, dtype=np.int32) % 8, (rows, 1))
    mask = np.ones((rows, width), dtype=np.bool_)
    mask[:, 0] = False
    return Batch(tokens, mask, np.full(rows, width, np.int32), np.arange(rows, dtype=np.int32))
