"""What a bench's turns add up to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, median

import numpy as np

from mlx_distill.bench.records import Figures, Parity, Projection, Spread, Timing, Turn

#: The largest relative difference of a loss that rounding explains, by the type computed in.
PARITY_LIMITS = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}

#: What a training is projected for: prompts and epochs. The first is the run that this project began with.
_PROJECTED = (("104 prompts", 104), ("10 thousand", 10_000), ("1 million", 1_000_000))
PROJECTED_EPOCHS = 5


def find_parity(turns: Iterable[Turn]) -> Parity | None:
    """How far the backends' losses are apart; None where fewer than two measured any."""
    found = [turn.timing for turn in turns if turn.timing]
    if len(found) < 2:
        return None
    first, *others = found
    steps = min(len(timing.losses) for timing in found)
    gaps = [abs(b - a) / abs(a) for other in others for a, b in zip(first.losses[:steps], other.losses, strict=False)]
    dtypes = {timing.device.rpartition(", ")[2] for timing in found}
    limit = max(PARITY_LIMITS.get(dtype, PARITY_LIMITS["bfloat16"]) for dtype in dtypes)
    # A loss that is no number is as far from any other as can be.
    largest = max((float("inf") if np.isnan(gap) else gap for gap in gaps), default=0.0)
    return Parity(steps=steps, largest=largest, limit=limit, backends=[timing.backend for timing in found])


def figures_of(backend: str, turns: Sequence[Turn]) -> Figures:
    """Of one backend's turns, but for those that failed and for turn 0, which ends after a few steps."""
    timings = [turn.timing for turn in turns if turn.backend == backend and turn.number and turn.timing]
    failures = [turn.failure for turn in turns if turn.backend == backend and turn.failure]
    if not timings:
        return Figures(backend=backend, failure=failures[0] if failures else "not run")
    steps = [seconds for timing in timings for epoch in timing.epochs for seconds in epoch.step_seconds]
    later = [fmean([e.seconds for e in timing.epochs[1:]]) for timing in timings if len(timing.epochs) > 1]
    joules = [timing.joules / _tokens(timing) for timing in timings if timing.joules is not None]
    return Figures(
        backend=backend,
        device=timings[0].device,
        ways=timings[0].ways,
        first_epoch=_spread([timing.epochs[0].seconds for timing in timings]),
        later_epoch=_spread(later) if later else None,
        tokens_per_second=_spread([_speed(timing) for timing in timings]),
        step_p50=float(np.percentile(steps, 50)),
        step_p95=float(np.percentile(steps, 95)),
        first_step=_spread([timing.first_step_seconds for timing in timings]),
        peak_bytes=max(timing.peak_bytes for timing in timings),
        device_bytes=max(timing.device_bytes for timing in timings),
        joules_per_token=median(joules) if joules else None,
        failure=failures[0] if failures else None,
    )


def ratios_to(first: str, turns: Sequence[Turn]) -> dict[str, Spread]:
    """How many times as fast as each other backend the first is, by tokens a second, each turn with its own."""
    speeds: dict[str, dict[int, float]] = {}
    for turn in turns:
        if turn.timing:
            speeds.setdefault(turn.backend, {})[turn.number] = _speed(turn.timing)
    mine = speeds.pop(first, {})
    both = {name: [mine[n] / speed for n, speed in found.items() if n in mine] for name, found in speeds.items()}
    return {name: _spread(values) for name, values in both.items() if values}


def project(rows: int, all_figures: Iterable[Figures]) -> list[Projection]:
    """How long other trainings of rows as long as these would take: the first epoch, and four like the later ones."""
    known = [figures for figures in all_figures if figures.first_epoch]
    made = []
    for name, count in _PROJECTED:
        seconds = {}
        for figures in known:
            assert figures.first_epoch is not None
            later = figures.later_epoch or figures.first_epoch
            whole = figures.first_epoch.median + (PROJECTED_EPOCHS - 1) * later.median
            seconds[figures.backend] = whole * count / rows
        made.append(Projection(name=name, rows=count, epochs=PROJECTED_EPOCHS, seconds=seconds))
    return made


def in_turn(backends: Sequence[str], number: int) -> list[str]:
    """The order of a turn: each backend is as often first as the others, since a machine warms and tires."""
    at = number % len(backends)
    return [*backends[at:], *backends[:at]]


def _speed(timing: Timing) -> float:
    return _tokens(timing) / sum(epoch.seconds for epoch in timing.epochs)


def _tokens(timing: Timing) -> int:
    return sum(epoch.tokens for epoch in timing.epochs)


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median=median(values), least=min(values), most=max(values))
