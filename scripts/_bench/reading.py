"""Have a teacher read a data set, in a process of its own: what it says is kept, and the memory it took is not.

python -m _bench.reading DATA TEACHER TOP_K FOLDER RESULT.json
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_distill.config import LogitsConfig
from mlx_distill.logits import write_logits
from mlx_distill.progress import Bar, Progress


class _Watch(Progress):
    """Times each task."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def task(self, title: str, total: float | None = None, *, unit: str = "") -> Iterator[Bar]:
        started = time.perf_counter()
        yield Bar()
        self.seconds[title] = time.perf_counter() - started


def main() -> None:
    data, teacher, top_k, folder, result = sys.argv[1:]
    watch = _Watch()
    record = write_logits(LogitsConfig(data=Path(data), teacher=teacher, top_k=int(top_k), out=Path(folder)), watch)
    found = {
        "positions": record.splits["train"].positions,
        "entry_bytes": record.entry_bytes,
        "seconds": watch.seconds["train: the teacher reads"],
    }
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
