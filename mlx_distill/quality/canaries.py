"""Programs whose outcome is known: they show that verification tells right from wrong and that its limits hold.

A verdict on an answer is worth what these are. Those of `BASIC` are about the runner itself; a sandbox has to pass
those of `confinement` as well, which try to get out of it.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent

from mlx_distill.execution import Execution, Limits, Outcome, run_python

_QUICK = Limits(seconds=20, cpu_seconds=20)


@dataclass(frozen=True)
class Canary:
    """One program.

    Attributes:
        name: What has to hold, such as "a failing test fails".
        source: Python.
        outcome: How it has to end.
        harmless: Looks for traces outside of the program; whether there are none.
    """

    name: str
    source: str
    outcome: Outcome
    limits: Limits = _QUICK
    harmless: Callable[[], bool] = lambda: True

    def sings(self, *, sandbox: bool) -> Execution | None:
        """Run it; None where all is as it has to be, else what happened."""
        execution = run_python(dedent(self.source), limits=self.limits, sandbox=sandbox)
        return None if execution.outcome == self.outcome and self.harmless() else execution


BASIC: tuple[Canary, ...] = (
    Canary("a right program passes", "def test_sum():\n    assert 1 + 1 == 2\n", "passed"),
    Canary("a failing test fails", "def test_sum():\n    assert 1 + 1 == 3\n", "failed"),
    Canary("an error fails", "raise ValueError('expected')", "failed"),
    Canary("leaving before the tests fails", "import os\nos._exit(0)\ndef test_sum():\n    assert False\n", "failed"),
    Canary("an endless loop is stopped", "while True: pass", "timeout", Limits(seconds=1.0, cpu_seconds=20)),
    Canary("too much memory is refused", "data = bytearray(1 << 30)", "memory", Limits(memory_bytes=256 << 20)),
    Canary(
        "the environment is not seen",
        """
        import os
        known = {"HOME", "LANG", "LC_CTYPE", "PATH", "TMPDIR", "PYTHONHASHSEED", "__CF_USER_TEXT_ENCODING"}
        assert set(os.environ) <= known, "more than expected"
        """,
        "passed",
    ),
)


@contextmanager
def confinement() -> Iterator[tuple[Canary, ...]]:
    """Programs that try to leave a sandbox: they pass where every attempt is refused.

    While this is open, two sockets on the loopback interface wait for them, and a folder for a file of theirs.

    Raises:
        OSError: Sockets or a folder could not be made.
    """
    with ExitStack() as stack:
        stream = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        datagrams = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        datagrams.bind(("127.0.0.1", 0))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlx-distill-canary-"))).resolve()
        (folder / "private.txt").write_text("not for programs")
        stream.setblocking(False)
        datagrams.setblocking(False)
        yield (
            Canary(
                "the network is out of reach",
                _NETWORK.format(stream=stream.getsockname()[1], datagrams=datagrams.getsockname()[1]),
                "passed",
                harmless=lambda: _unvisited(stream, datagrams),
            ),
            Canary(
                "nothing is written outside",
                _WRITING.format(folder=str(folder)),
                "passed",
                harmless=lambda: [entry.name for entry in folder.iterdir()] == ["private.txt"],
            ),
            Canary("nothing private is read", _READING.format(places=_private_places(folder)), "passed"),
        )


_NETWORK = """
import socket
for kind, port in ((socket.SOCK_STREAM, {stream}), (socket.SOCK_DGRAM, {datagrams})):
    try:
        with socket.socket(socket.AF_INET, kind) as connection:
            connection.settimeout(5)
            connection.connect(("127.0.0.1", port))
            connection.send(b"out")
    except OSError:
        continue
    raise SystemExit("reached")
"""

_WRITING = """
from pathlib import Path
for attempt in (
    lambda: Path({folder!r}, "new.txt").write_text("out"),
    lambda: Path({folder!r}, "private.txt").unlink(),
    lambda: Path({folder!r}, "private.txt").open("a").close(),
    lambda: Path("main.py").rename(Path({folder!r}, "moved.py")),
):
    try:
        attempt()
    except OSError:
        continue
    raise SystemExit("wrote")
Path("inside.txt").write_text("in")
"""

_READING = """
import os
for place in {places!r}:
    try:
        os.listdir(place) if os.path.isdir(place) else open(place, "rb").read(1)
    except OSError:
        continue
    raise SystemExit("read")
"""


def _private_places(folder: Path) -> list[str]:
    places = [f"/proc/{os.getpid()}/environ"]
    with suppress(RuntimeError):
        places.append(str(Path.home()))
    # On macOS the system's own policy opens the temporary folders for reading.
    return places if folder.is_relative_to("/private") else [*places, str(folder / "private.txt")]


def _unvisited(stream: socket.socket, datagrams: socket.socket) -> bool:
    for visit in (stream.accept, lambda: datagrams.recv(1)):
        with suppress(BlockingIOError):
            visit()
            return False
    return True
