"""Feeds the metrics of a run to experiment trackers, beside `metrics.jsonl`, which stays the truth.

A tracker is a mirror: it may lag, fail or go away, and never holds the training up. Each is fed by a thread of its own,
and one that fails is named once and let go. Whatever was written about a step goes out together, once the step is
complete, and each tracker is given only the steps that it lacks. So where a run that was interrupted goes on, the rows
of earlier processes coming first, no step is left out and none is there twice.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import TracebackType
from typing import Protocol, Self

from mlx_distill.errors import TrainingError
from mlx_distill.progress import SILENT, Progress
from mlx_distill.run_records import MetricRow

#: How long the trackers may take to end, and how long they may where the user has asked to stop.
FINISH_SECONDS, INTERRUPT_SECONDS = 60.0, 5.0

#: After which the user is told what is waited for.
_PATIENCE_SECONDS = 1.0


@dataclass(frozen=True)
class Point:
    """All metrics of one optimizer step.

    Attributes:
        seconds: Time that the run had taken.
        values: Under the names of the trackers: train/loss, valid/token_accuracy and the like.
    """

    step: int
    seconds: float
    values: dict[str, float] = field(default_factory=dict)


class Tracker(Protocol):
    """Somewhere that metrics are shown. What it raises ends the tracking, not the training."""

    #: The first step that it lacks.
    next_step: int

    def log(self, point: Point) -> None:
        """Take the metrics of a step; steps come in their order, each once."""
        ...

    def close(self, *, finished: bool) -> None:
        """Take no more.

        Args:
            finished: Whether the run has come to its end; otherwise it may go on later.
        """
        ...


class Trackers:
    """All trackers of a run, ended with its context; with none of them, it does nothing."""

    def __init__(self, progress: Progress = SILENT) -> None:
        self._progress = progress
        self._feeds: list[_Feed] = []
        self._point: Point | None = None
        self._seconds = 0.0

    def add(self, name: str, make: Callable[[], Tracker], *, hint: str) -> None:
        """Start a tracker.

        Args:
            hint: What to do where it does not start.

        Raises:
            TrainingError: It cannot be started.
        """
        # Trackio keeps its run in a context variable: ended in this context, it is not ended once more at exit.
        context = contextvars.copy_context()
        try:
            tracker = context.run(make)
        except Exception as error:
            raise TrainingError(f"{name} could not be started: {_said(error)}", hint=hint) from error
        self._feeds.append(_Feed(name, tracker, context))

    def observe(self, row: MetricRow) -> None:
        """Take a row of `metrics.jsonl`, every row of the run in its order. Neither waits nor raises."""
        self._let_go_of_failed()
        if self._point is not None and row.step != self._point.step:
            self._send_point()
        if self._point is None:
            self._point = Point(row.step, row.seconds)
        self._point.values.update(values_of(row, row.seconds - self._seconds))
        self._seconds = row.seconds

    def close(self, *, finished: bool, wait_seconds: float) -> None:
        """End all trackers, waiting no longer than `wait_seconds` for what they still have to send."""
        deadline = time.monotonic() + wait_seconds
        for feed in self._feeds:
            feed.end(finished=finished)
        for feed in self._feeds:
            if not feed.ended(min(_PATIENCE_SECONDS, wait_seconds)):
                self._progress.say(f"Waiting for {feed.name} to take the last metrics.")
            if not feed.ended(deadline - time.monotonic()):
                self._progress.say(f"{feed.name} did not end in time, and may lack the last metrics.")
        self._let_go_of_failed()
        self._feeds.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A step that was interrupted may lack rows, as that of its validation; it is sent when the run has gone on.
        if error is None or isinstance(error, TrainingError):
            self._send_point()
        wait_seconds = INTERRUPT_SECONDS if isinstance(error, KeyboardInterrupt) else FINISH_SECONDS
        self.close(finished=error is None, wait_seconds=wait_seconds)

    def _send_point(self) -> None:
        if self._point is not None:
            for feed in self._feeds:
                feed.send(self._point)
        self._point = None

    def _let_go_of_failed(self) -> None:
        for feed in [feed for feed in self._feeds if feed.failure is not None]:
            self._feeds.remove(feed)
            assert feed.failure is not None
            self._progress.say(
                f"{feed.name} failed and gets no more metrics: {_said(feed.failure)} metrics.jsonl has them all."
            )


class _Feed:
    """A tracker and the thread that feeds it."""

    def __init__(self, name: str, tracker: Tracker, context: contextvars.Context) -> None:
        self.name = name
        self.failure: BaseException | None = None
        self._tracker = tracker
        self._next_step = tracker.next_step
        # Without a bound: a point is some hundred bytes, so what waits for a tracker that hangs does not weigh.
        self._queue: SimpleQueue[Point | bool] = SimpleQueue()
        self._thread = threading.Thread(target=context.run, args=(self._work,), name=f"tracker {name}", daemon=True)
        self._thread.start()

    def send(self, point: Point) -> None:
        if point.step >= self._next_step:
            self._queue.put(point)

    def end(self, *, finished: bool) -> None:
        self._queue.put(finished)

    def ended(self, wait_seconds: float) -> bool:
        self._thread.join(max(0.0, wait_seconds))
        return not self._thread.is_alive()

    def _work(self) -> None:
        try:
            while isinstance(item := self._queue.get(), Point):
                self._tracker.log(item)
            self._tracker.close(finished=item)
        except BaseException as error:  # noqa: BLE001 - a foreign library may raise anything, and nobody else is here
            self.failure = error
            with suppress(BaseException):
                self._tracker.close(finished=False)


def values_of(row: MetricRow, seconds: float) -> dict[str, float]:
    """A row under the names of the trackers.

    Args:
        seconds: Between this row and the one before it: of a step's row, the time that the step took.
    """
    # A student's own answers are likely by their nature: on them begins another curve than on the data's.
    of = f"{'train' if row.kind == 'step' else row.kind}/{'own_' if row.on_policy else ''}"
    epoch = "epoch_" if row.kind == "train" else ""
    values = {
        f"{of}{epoch}loss": row.loss,
        f"{of}{epoch}token_accuracy": row.token_accuracy,
        f"{of}{epoch}divergence": row.divergence,
    }
    if row.kind == "step":
        values |= {
            "train/learning_rate": row.learning_rate,
            "train/grad_norm": row.grad_norm,
            "train/tokens_per_second": row.tokens / seconds if seconds > 0 else None,
        }
    return {name: value for name, value in values.items() if value is not None}


def _said(error: BaseException) -> str:
    """The first line of what an error says, as a sentence."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if line.endswith((".", "!", "?")) else f"{line}."
