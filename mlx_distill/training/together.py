"""What several processes that train one adapter must have in common, and how they come to have it.

Rank 0 writes the run. Every other process runs the very same loop, into a temporary folder of its own, so that it, too,
has the best adapter at hand; what it starts from comes from rank 0.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_distill import layout
from mlx_distill.backends.base import Peers
from mlx_distill.errors import ConfigError
from mlx_distill.run_records import MemoryPlan, RunRecord

#: Bytes of a file that travel at once.
_CHUNK = 64 << 20


def any_of(peers: Peers, flag: bool) -> bool:
    """Whether it holds in any process."""
    return flag if peers.size == 1 else b"1" in peers.gather(b"1" if flag else b"0")


def from_first(peers: Peers, content: bytes) -> bytes:
    """What rank 0 gives; what others give is left."""
    return peers.gather(content if peers.rank == 0 else b"")[0]


def require_alike(peers: Peers, facts: Mapping[str, str]) -> None:
    """Make sure that all processes are about to do the same.

    Args:
        peers: Each calls this with its own facts.
        facts: Under what to call them, such as "the base model".

    Raises:
        ConfigError: In all processes, if any fact differs.
    """
    found = [json.loads(content) for content in peers.gather(json.dumps(facts).encode())]
    for name in facts:
        values = [other.get(name) for other in found]
        if different := [rank for rank, value in enumerate(values) if value != values[0]]:
            rank = different[0]
            raise ConfigError(
                f"{name} is not the same on all machines: {values[0]} for rank 0, {values[rank]} for rank {rank}.",
                hint="Copy the data set and the model, and install the same versions, on every machine.",
            )


def common_plan(peers: Peers, mine: MemoryPlan) -> MemoryPlan:
    """The plan of the process with the least room, for all; where rows are kept stays each process's own matter."""
    plans = [MemoryPlan.model_validate_json(content) for content in peers.gather(mine.model_dump_json().encode())]
    least = min(plans, key=lambda plan: (not plan.checkpointing, plan.micro_batch_size, plan.activation_bytes))
    answers = [plan.writing_rows for plan in plans if plan.writing_rows is not None]
    return with_own_cache(least.model_copy(update={"writing_rows": min(answers, default=None)}), mine)


def with_own_cache(plan: MemoryPlan, mine: MemoryPlan) -> MemoryPlan:
    """A plan with another's keeping of rows, which changes no number."""
    own = ("prefix_cache", "prefix_bytes", "said_bytes", "peak_bytes", "limit_bytes")
    return plan.model_copy(update={name: getattr(mine, name) for name in own})


def share_run(peers: Peers, folder: layout.RunFolder) -> None:
    """Give every process what rank 0's folder holds of a run to go on with: checkpoints, metrics, the best adapter."""
    if peers.size == 1:
        return
    single = [folder.adapter, folder.adapter_config, folder.metrics]
    mine = [path.relative_to(folder.root) for path in [*single, *_files(folder.checkpoints)] if path.is_file()]
    names = json.loads(from_first(peers, json.dumps([path.as_posix() for path in mine]).encode()))
    for name in names:
        _share_file(peers, folder.root / name)


def require_one_run(peers: Peers, record: RunRecord) -> None:
    """See `require_alike`: versions, settings, data and base model of a run about to begin."""
    require_alike(
        peers,
        {
            "mlx-distill": record.version,
            "The data set": ", ".join(f"{name} {split.sha256[:12]}" for name, split in record.splits.items()),
            "The base model": record.model.revision or record.model.name,
            "What is to be run": record.identity,
        },
    )


def _files(folder: Path) -> Sequence[Path]:
    return [path for path in sorted(folder.glob("*")) if not path.name.startswith(".")]


def _share_file(peers: Peers, path: Path) -> None:
    if peers.rank == 0:
        with path.open("rb") as source:
            while part := source.read(_CHUNK):
                peers.gather(part)
            peers.gather(b"")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as target:
        while part := peers.gather(b"")[0]:
            target.write(part)
