"""The base model of a run by a name that means the same on every machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mlx_distill.models.bundled import BUNDLED
from mlx_distill.models.hub import HUB_ID
from mlx_distill.records import ModelRecord

_COMMIT = re.compile(r"[0-9a-f]{40}")

#: Where the Hub's own cache keeps a commit of a model.
_IN_CACHE = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})$")


@dataclass(frozen=True)
class Base:
    """A base model that others can find.

    Attributes:
        hub_id: On the Hub.
        record: What the published run says of it: no place on this machine, and a spec that finds the same weights.
        converted: Whether these weights were made from a quantized file, and so differ from those on the Hub.
    """

    hub_id: str
    record: ModelRecord
    converted: bool = False


def name_base(model: ModelRecord) -> Base | None:
    """How others can find a base model; None where it is a folder or a file of this machine alone."""
    if model.spec in BUNDLED and model.source == "bundled":
        return Base(BUNDLED[model.spec].hub_id, model.model_copy(update={"path": ""}), converted=True)
    if model.source == "hub":
        named = HUB_ID.fullmatch(model.spec)
        hub_id = named["id"] if named else BUNDLED[model.spec].hub_id if model.spec in BUNDLED else None
        return None if hub_id is None else _on_the_hub(hub_id, model.revision, model)
    cached = _IN_CACHE.search(Path(model.path).as_posix()) if model.source == "folder" else None
    return _on_the_hub(f"{cached['owner']}/{cached['name']}", cached["commit"], model) if cached else None


def _on_the_hub(hub_id: str, revision: str | None, model: ModelRecord) -> Base:
    # By its commit where that is known: what the name alone means can change, and fuse would refuse it then.
    pinned = revision is not None and _COMMIT.fullmatch(revision)
    spec = f"{hub_id}@{revision}" if pinned else hub_id
    name = hub_id.rpartition("/")[2]
    return Base(
        hub_id,
        model.model_copy(update={"spec": spec, "source": "hub", "path": "", "name": name, "revision": revision}),
    )
