"""The processes of one data-parallel training, over MLX's own distributed engine: ring, JACCL, MPI or NCCL.

`mlx.launch` starts the same command once a machine and tells each its rank by environment variables; what connects them
is then `mx.distributed`. Nothing here is known of sockets.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from mlx_distill.errors import ResourceError

#: Environment variables by which a launcher says that there are several: mlx.launch's own, Open MPI's, MPICH's.
_LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")

#: Seconds in which whoever watches over the processes says which of them has died, and ends this one.
_VERDICT = 15

Key = TypeVar("Key", bound=str)


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return any(name in os.environ for name in _LAUNCHED)


def first_hosts() -> list[str]:
    """Addresses of the machine of rank 0, where the launcher told them."""
    if path := os.environ.get("MLX_HOSTFILE"):
        try:
            first = json.loads(Path(path).read_text(encoding="utf-8"))[0]
        except (OSError, ValueError, LookupError):
            return []
        return [address.rpartition(":")[0] for address in first]
    if coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        return [coordinator.rpartition(":")[0]]
    return []


class Group:
    """Implements `backends.base.Peers`. Every process must call the same methods in the same order.

    Raises:
        ResourceError: The processes cannot reach each other.
    """

    def __init__(self) -> None:
        try:
            self._group = mx.distributed.init()
        except RuntimeError as error:
            raise self._unreachable(str(error)) from error
        self.rank: int = self._group.rank()
        self.size: int = self._group.size()
        self._calls = 0
        if self.size == 1 and os.environ.get("MLX_RANK", "0") != "0":
            raise self._unreachable("no engine of MLX came up")

    def gather(self, content: bytes) -> list[bytes]:
        """See `Peers.gather`."""
        if self.size == 1:
            return [content]
        self._calls += 1
        header = np.array([[self._calls, len(content), zlib.crc32(content)]], dtype=np.uint32)
        headers = self._gathered(np.pad(header, ((0, 0), (0, 1)), constant_values=_seal(header[0])))
        # A connection that breaks can also leave what was in memory before, such as an earlier message.
        if any(head[0] != self._calls or seal != _seal(head) for *head, seal in headers.tolist()):
            raise _broken("a message was cut off")
        longest = int(headers[:, 1].max())
        if not longest:
            return [b""] * self.size
        padded = np.zeros((1, longest), dtype=np.uint8)
        padded[0, : len(content)] = np.frombuffer(content, dtype=np.uint8)
        found = [row[: head[1]].tobytes() for row, head in zip(self._gathered(padded), headers, strict=True)]
        if any(zlib.crc32(part) != head[2] for part, head in zip(found, headers, strict=True)):
            raise _broken("a message was cut off")
        return found

    def sum(self, arrays: Mapping[Key, mx.array]) -> dict[Key, mx.array]:
        """Sums over all processes, of float32 arrays that have the same names and shapes in each.

        They travel as one, as what each message costs beside its bytes is most of what a small array costs. Whether
        all of them arrived, the next `gather` tells: what breaks stays broken.
        """
        if self.size == 1:
            return dict(arrays)
        names = sorted(arrays)
        flat = mx.concatenate([arrays[name].reshape(-1).astype(mx.float32) for name in names])
        with _connected():
            total = mx.distributed.all_sum(flat, group=self._group)
            mx.eval(total)
        found, at = {}, 0
        for name in names:
            value = arrays[name]
            found[name] = total[at : at + value.size].reshape(value.shape)
            at += value.size
        return found

    def _gathered(self, array: NDArray[Any]) -> NDArray[Any]:
        """The arrays of all processes, one below the other."""
        with _connected():
            return np.array(mx.distributed.all_gather(mx.array(array), group=self._group))

    @staticmethod
    def _unreachable(why: str) -> ResourceError:
        return ResourceError(
            f"The processes that were launched together cannot reach each other: {why}.",
            hint="Check the hosts with  mlx.launch --verbose --hosts … hostname ; or train without it.",
        )


@contextmanager
def _connected() -> Iterator[None]:
    """Turn a connection that breaks into an error of ours; MLX's engine knows no more of it than its number."""
    try:
        yield
    except RuntimeError as error:
        raise _broken(str(error)) from error


def _broken(why: str) -> ResourceError:
    time.sleep(_VERDICT)
    return ResourceError(
        f"The connection to another process broke: {why}.",
        hint="The last checkpoint stands; the same command goes on from it.",
    )


def _seal(header: Iterable[int]) -> int:
    """What tells a header from any other bytes."""
    return zlib.crc32(np.array(list(header), dtype=np.uint32).tobytes())
