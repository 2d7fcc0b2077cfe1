"""Notices the death of a process that trains along, so that no other waits for it for ever.

MLX's engine waits for a peer without end, in a place where no signal handler of Python runs. So beside it every process
holds a plain TCP connection to that of rank 0. One that ends in good order says so; a connection that just closes, or
goes silent, is a death: every other process says whose, and ends.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from mlx_distill.backends.base import Peers
from mlx_distill.errors import ResourceError

#: Seconds to wait for a connection, and for a machine that no longer answers.
_PATIENCE = 15

#: Seconds that a process has to end by itself once another has ended: most often for the same reason.
_GRACE = 3

#: What is sent last: all is done; or the end of one process, with what it had to say.
_DONE, _ENDED = b"done", b"ended "

_TOKEN_BYTES, _RANK_DIGITS = 16, 5

#: Takes a sentence, and whether rank 0, whose words all see, has said it already.
Lost = Callable[[str, bool], None]


def end_process(message: str, said: bool) -> None:
    """Say why, and end at once: the main thread may be waiting where it cannot be woken."""
    if not said:
        sys.stderr.write(f"\nError: {message}\n")
        sys.stderr.flush()
    os._exit(1)


class Watch:
    """Watches over the other processes until it is closed.

    Args:
        connections: By rank: to rank 0, or, in rank 0, to all others.
        lost: Called once, in a thread of its own.
    """

    def __init__(self, connections: dict[int, socket.socket], lost: Lost) -> None:
        self._connections = connections
        self._lost = lost
        self._waker, self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="liveness", daemon=True)
        self._thread.start()

    def close(self, reason: str | None = None) -> None:
        """Stop watching, and tell the others that this process ends.

        Args:
            reason: Why, if it is not that all is done.
        """
        self._wake.send(b"x")
        self._thread.join(_PATIENCE)
        self._tell(_DONE if reason is None else _ENDED + reason.encode())
        for connection in [*self._connections.values(), self._waker, self._wake]:
            connection.close()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._waker, selectors.EVENT_READ, None)
            for rank, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, rank)
            while len(selector.get_map()) > 1:
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    assert isinstance(key.fileobj, socket.socket)
                    last = _last_words(key.fileobj)
                    if last == _DONE:
                        selector.unregister(key.fileobj)
                        continue
                    why = f"The process of rank {key.data} has ended"
                    why += f": {last.removeprefix(_ENDED).decode(errors='replace')}" if last else " without a word."
                    self._tell(_ENDED + why.encode())
                    if not self._closed_within(_GRACE):
                        hint = "The last checkpoint stands; the same command goes on from it."
                        self._lost(f"{why}\n  {hint}", bool(last) and key.data == 0)
                    return

    def _closed_within(self, seconds: float) -> bool:
        self._waker.settimeout(seconds)
        try:
            return bool(self._waker.recv(1))
        except TimeoutError:
            return False

    def _tell(self, words: bytes) -> None:
        for connection in self._connections.values():
            try:
                connection.sendall(words)
                connection.shutdown(socket.SHUT_WR)
            except OSError:
                # It has ended, too.
                continue


def _last_words(connection: socket.socket) -> bytes:
    """All that a process sends before its connection closes; nothing, if it died."""
    words = b""
    try:
        while part := connection.recv(4096):
            words += part
    except OSError:
        return b""
    return words


@contextmanager
def watched(peers: Peers, hosts: Sequence[str], lost: Lost = end_process) -> Iterator[None]:
    """While open, this process ends with a message when another one does.

    Args:
        peers: All of them enter here at the same time.
        hosts: Addresses of rank 0's machine, where they are known.
        lost: What to do about a death; see `Watch`.

    Raises:
        ResourceError: Rank 0 cannot be reached.
    """
    if peers.size == 1:
        yield
        return
    watch = Watch(_accept(peers, hosts) if peers.rank == 0 else _connect(peers), lost)
    try:
        yield
    except BaseException as error:
        watch.close(str(error) or type(error).__name__)
        raise
    watch.close()


def _accept(peers: Peers, hosts: Sequence[str]) -> dict[int, socket.socket]:
    """The connections of all others, each of which shows that it was invited."""
    token = secrets.token_hex(_TOKEN_BYTES)
    connections: dict[int, socket.socket] = {}
    with socket.create_server(("", 0), backlog=peers.size) as server:
        server.settimeout(_PATIENCE)
        names = list(dict.fromkeys([*hosts, socket.gethostname(), "127.0.0.1"]))
        peers.gather(f"{token} {server.getsockname()[1]} {','.join(names)}".encode())
        while len(connections) < peers.size - 1:
            try:
                connection, _ = server.accept()
            except OSError:
                break
            if (rank := _greeted(connection, token)) is None:
                connection.close()
            else:
                connections[rank] = _kept_alive(connection)
    _all_connected(peers, len(connections) == peers.size - 1)
    return connections


def _greeted(connection: socket.socket, token: str) -> int | None:
    """The rank of who has connected; None for a stranger."""
    connection.settimeout(_PATIENCE / 5)
    try:
        greeting = connection.recv(len(token) + _RANK_DIGITS, socket.MSG_WAITALL)
    except OSError:
        return None
    invited = secrets.compare_digest(greeting[: len(token)], token.encode())
    rank = greeting[len(token) :]
    return int(rank) if invited and len(rank) == _RANK_DIGITS else None


def _connect(peers: Peers) -> dict[int, socket.socket]:
    token, port, names = peers.gather(b"")[0].decode().split(" ")
    connection = None
    for name in names.split(","):
        try:
            connection = socket.create_connection((name, int(port)), timeout=_PATIENCE / 3)
            connection.sendall(f"{token}{peers.rank:0{_RANK_DIGITS}d}".encode())
            break
        except OSError:
            connection = None
    _all_connected(peers, connection is not None)
    assert connection is not None
    return {0: _kept_alive(connection)}


def _all_connected(peers: Peers, mine: bool) -> None:
    failed = [rank for rank, found in enumerate(peers.gather(b"1" if mine else b"0")) if found != b"1"]
    if failed:
        raise ResourceError(
            f"The processes of rank 0 and {', '.join(str(rank) for rank in failed if rank) or 'others'} "
            "have no connection beside MLX's.",
            hint="Let Python accept connections in the firewall of the first machine.",
        )


def _kept_alive(connection: socket.socket) -> socket.socket:
    """Blocking, and found dead some seconds after its machine is."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # macOS calls the first of these by another name.
    options = {"TCP_KEEPIDLE": 5, "TCP_KEEPALIVE": 5, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}
    for name, value in options.items():
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
    return connection
