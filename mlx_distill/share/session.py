"""How the Hub is spoken to: with patience that has an end, and that is told.

huggingface_hub tries again for some calls and not for others, as long as the Hub asks it to wait, and in silence. While
a `patient_session` is open it does none of that: what may pass by itself comes out as `UnavailableError`, and
`patiently` makes the whole call again. Every call that is made this way may be made twice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeVar

from mlx_distill.errors import ModelError
from mlx_distill.models.hub_errors import reason_of
from mlx_distill.progress import Progress

T = TypeVar("T")

TRIES = 6
#: Seconds. Who asks for more is better asked again another day.
LONGEST_WAIT = 120.0
_FIRST_WAIT = 1.0

_PASSING = (408, 429, 500, 502, 503, 504)

#: Seconds without a byte from the Hub, or to it, before a connection is given up.
_STALLED = 60.0
_CONNECT = 15.0


class UnavailableError(Exception):
    """The Hub did not do what was asked, and may do it later.

    Attributes:
        wait: Seconds that it asks to wait; None where it does not say.
    """

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@contextmanager
def patient_session() -> Iterator[None]:
    """Let huggingface_hub raise `UnavailableError` at once, while the context is open, and draw nothing."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    drawn = not are_progress_bars_disabled()
    set_client_factory(_client)
    disable_progress_bars()
    try:
        yield
    finally:
        set_client_factory(default_client_factory)
        if drawn:
            enable_progress_bars()


def patiently(call: Callable[[], T], *, what: str, progress: Progress) -> T:
    """Make a call, and make it again after a while where that may help.

    Args:
        what: Is being done, for the lines that say so.

    Raises:
        ModelError: It did not help, or the Hub asks to wait too long.
    """
    for attempt in count(1):
        try:
            return call()
        except Exception as error:
            found = _unavailable(error)
            if found is None:
                raise
            wait = found.wait if found.wait is not None else _FIRST_WAIT * 2 ** (attempt - 1)
            if attempt == TRIES:
                raise ModelError(
                    f"{what}: the Hub {found}, {TRIES} times in a row.",
                    hint="The same command goes on later; what was sent is not sent again.",
                ) from None
            if wait > LONGEST_WAIT:
                raise ModelError(
                    f"{what}: the Hub {found}, and asks to wait {wait:,.0f} s.",
                    hint="The same command goes on then; what was sent is not sent again.",
                ) from None
        progress.say(f"{what}: the Hub {found}; trying again in {wait:g} s ({attempt} of {TRIES - 1}).")
        time.sleep(wait)
    raise AssertionError("counts for ever")


def _client() -> Any:
    import httpx2

    class Client(httpx2.Client):
        def send(self, request: httpx2.Request, **kwargs: Any) -> httpx2.Response:
            try:
                response = super().send(request, **kwargs)
            except httpx2.ConnectError as error:
                raise UnavailableError(f"could not be reached ({reason_of(error)})") from error
            except httpx2.TimeoutException as error:
                raise UnavailableError("does not answer") from error
            except (httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
                raise UnavailableError(f"broke the connection ({reason_of(error)})") from error
            if response.status_code in _PASSING:
                response.close()
                raise UnavailableError(f"answers {response.status_code}", _asked_wait(response.headers))
            return response

    return Client(follow_redirects=True, timeout=httpx2.Timeout(_STALLED, connect=_CONNECT))


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds that an answer asks to wait: `Retry-After`, or the time to the end of a used-up rate limit."""
    if (asked := headers.get("retry-after", "").strip()).isdigit():
        return float(asked)
    limit = headers.get("ratelimit", "")
    reset = re.search(r"\bt=(\d+)", limit)
    return float(reset[1]) if reset and re.search(r"\br=0\b", limit) else None


def _unavailable(error: BaseException | None) -> UnavailableError | None:
    """The cause that may pass; huggingface_hub wraps what happens in its threads."""
    while error is not None:
        if isinstance(error, UnavailableError):
            return error
        error = error.__cause__
    return None
