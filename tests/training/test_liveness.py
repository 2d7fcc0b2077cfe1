"""Deaths are noticed and passed on; good ends are not taken for deaths."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from queue import Empty, Queue

import pytest

from mlx_distill.errors import ResourceError
from mlx_distill.training import liveness
from mlx_distill.training.liveness import watched

SIZE = 3


class Threads:
    """Peers that are threads of this process.

    Args:
        rank: Of this one.
        board: What each gives, and how they wait for each other.
    """

    size = SIZE

    def __init__(self, rank: int, barrier: threading.Barrier, board: list[bytes]) -> None:
        self.rank = rank
        self._barrier = barrier
        self._board = board

    def gather(self, content: bytes) -> list[bytes]:
        self._board[self.rank] = content
        self._barrier.wait(20)
        found = list(self._board)
        self._barrier.wait(20)
        return found


def run_all(body: Callable[[int], None]) -> tuple[dict[int, str], dict[int, BaseException]]:
    """Let each of three peers run the body under watch; what each learned of a death, and what each raised."""
    barrier, board = threading.Barrier(SIZE), [b""] * SIZE
    learned: Queue[tuple[int, str]] = Queue()
    raised: dict[int, BaseException] = {}

    def one(rank: int) -> None:
        try:
            with watched(Threads(rank, barrier, board), ["127.0.0.1"], lambda why, _: learned.put((rank, why))):
                body(rank)
        except (ValueError, ResourceError) as error:
            raised[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(SIZE)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    found = {}
    while True:
        try:
            rank, why = learned.get_nowait()
        except Empty:
            return found, raised
        assert rank not in found
        found[rank] = why


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_GRACE", 0.3)


def test_good_ends_are_no_deaths() -> None:
    learned, raised = run_all(lambda rank: time.sleep(0.2 * rank))
    assert not learned
    assert not raised


@pytest.mark.parametrize("dies", range(SIZE))
def test_an_error_is_told_to_all_others_with_its_reason(dies: int) -> None:
    def body(rank: int) -> None:
        if rank == dies:
            raise ValueError("no memory left")
        time.sleep(1.5)

    learned, raised = run_all(body)
    assert set(raised) == {dies}
    assert set(learned) == set(range(SIZE)) - {dies}
    for rank, why in learned.items():
        assert "no memory left" in why, rank
        assert f"rank {dies} has ended" in why


def test_who_ends_for_the_same_reason_is_left_to_end_by_itself() -> None:
    def body(rank: int) -> None:
        time.sleep(0.05 * rank)
        raise ValueError("the loss is not finite")

    learned, raised = run_all(body)
    assert not learned
    assert len(raised) == SIZE


@pytest.mark.parametrize("dies", range(SIZE))
def test_a_connection_that_just_closes_is_a_death(dies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system does to a process that is killed: its sockets close, and nothing is said."""
    by_thread: dict[int, list[socket.socket]] = {}
    real = liveness.Watch.__init__

    def noted(self: liveness.Watch, connections: dict[int, socket.socket], lost: Callable[[str, bool], None]) -> None:
        by_thread[threading.get_ident()] = list(connections.values())
        real(self, connections, lost)

    monkeypatch.setattr(liveness.Watch, "__init__", noted)

    def body(rank: int) -> None:
        if rank == dies:
            for connection in by_thread[threading.get_ident()]:
                connection.shutdown(socket.SHUT_RDWR)
        time.sleep(1.5)

    learned, _ = run_all(body)
    assert set(learned) >= set(range(SIZE)) - {dies}
    for rank in set(range(SIZE)) - {dies}:
        assert "without a word" in learned[rank]


def test_a_stranger_is_not_taken_for_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody who scans ports connects first, and says the wrong thing."""
    real = socket.create_server

    def scanned(*arguments: object, **options: object) -> socket.socket:
        server = real(*arguments, **options)  # type: ignore[arg-type]
        stranger = socket.create_connection(("127.0.0.1", server.getsockname()[1]))
        stranger.sendall(b"GET / HTTP/1.1\r\nHost: somewhere.example.org\r\n\r\n")
        strangers.append(stranger)
        return server

    strangers: list[socket.socket] = []
    monkeypatch.setattr(liveness.socket, "create_server", scanned)
    learned, raised = run_all(lambda rank: None)
    assert strangers
    assert not learned
    assert not raised
    for stranger in strangers:
        stranger.close()


def test_a_wall_between_is_an_error_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "_PATIENCE", 1)

    def refused(*_: object, **__: object) -> socket.socket:
        raise ConnectionRefusedError

    monkeypatch.setattr(liveness.socket, "create_connection", refused)
    _, raised = run_all(lambda rank: None)
    assert len(raised) == SIZE
    assert all(isinstance(error, ResourceError) for error in raised.values())
