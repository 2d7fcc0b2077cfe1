"""Whether this process trains alone, or was launched as one of several."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_distill.backends.base import ALONE, Peers
from mlx_distill.training.liveness import watched


@contextmanager
def joined() -> Iterator[Peers]:
    """The processes that `mlx.launch` or `mpirun` started together; each of them ends when another one does.

    Raises:
        ResourceError: They cannot reach each other.
    """
    from mlx_distill.backends.mlx.group import Group, first_hosts, launched

    if not launched():
        yield ALONE
        return
    peers = Group()
    with watched(peers, first_hosts()):
        yield peers
