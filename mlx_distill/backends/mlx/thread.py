"""A thread that owns MLX, for callers that must not wait: an event loop, mostly.

What MLX computes is bound to the thread that made it, so a model that is used from a thread is loaded, used and
let go of there.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

import mlx.core as mx

T = TypeVar("T")


class MlxThread:
    """Runs calls one after another in a thread of its own, until it is closed or the process ends.

    Args:
        name: Of the thread.
    """

    def __init__(self, name: str) -> None:
        self._calls: SimpleQueue[_Call | None] = SimpleQueue()
        # A daemon with an end at exit: one that is no daemon would keep a process alive that forgot to close it.
        self._thread = threading.Thread(target=_serve, args=(self._calls,), name=name, daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run a call in the thread, after those before it.

        Returns:
            Its result or exception. Cancelling it keeps a call that waits from being run.
        """
        future: Future[T] = Future()
        self._calls.put(_Call(call, future))
        return future

    def close(self) -> None:
        """Wait for the calls under way, and end the thread. Nothing may be submitted any more."""
        atexit.unregister(self.close)
        self._calls.put(None)
        self._thread.join()


class _Call:
    def __init__(self, call: Callable[[], Any], future: Future[Any]) -> None:
        self._call, self._future = call, future

    def run(self) -> None:
        if not self._future.set_running_or_notify_cancel():
            return
        try:
            result = self._call()
        except BaseException as error:  # noqa: BLE001 - it belongs to the one who waits for the result
            self._future.set_exception(error)
        else:
            self._future.set_result(result)


def _serve(calls: SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        call.run()
        # Not kept until the next: it may hold what the caller has let go of.
        del call
    # Without this MLX ends the thread's streams some time later, and aborts the process if that ends first.
    mx.clear_streams()
