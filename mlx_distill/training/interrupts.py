"""Ctrl-C and SIGTERM between two steps, never inside one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mlx_distill.progress import Progress


class Interrupts:
    """Whether the user has asked to stop."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def deferred(progress: Progress) -> Iterator[Interrupts]:
    """Hold interrupts back while the context is open, so that the caller can stop at a clean point.

    The first one only sets `asked`; a second one raises KeyboardInterrupt at once. In a thread other than the
    main one, where signals cannot be handled, nothing is changed.
    """
    interrupts = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return

    def handle(_signal: int, _frame: FrameType | None) -> None:
        if interrupts.asked:
            raise KeyboardInterrupt
        interrupts.asked = True
        progress.say("Stopping after this step, to save a checkpoint. Once more stops at once.")

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, handle) for number in signals]
    try:
        yield interrupts
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)
