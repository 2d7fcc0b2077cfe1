"""What is published of a record: all but the places on this machine.

A path says who its user is and how the disk is laid out, and helps nobody elsewhere. Of each, its last name is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_distill.records import ModelRecord
from mlx_distill.run_records import RunRecord
from mlx_distill.runs import FusedRecord
from mlx_distill.share.base import Base

#: Settings of a training that name places.
_PLACES = ("data", "run", "model")

#: `recorded:PATH` and `mlx:PATH`, where the path is one of this machine.
_SPEC = re.compile(r"(?P<provider>[a-z]+:)?(?P<path>(?!//)(?:[/~.\\]|[A-Za-z]:[/\\]).*)", re.DOTALL)


def clean_run(run: RunRecord, base: Base | None) -> RunRecord:
    """A run's record as others may read it; `fuse` and `compare` work with it where the base has a name."""
    model = base.record if base else unnamed(run.model)
    config = {**run.config, **{key: short(str(run.config[key])) for key in _PLACES if key in run.config}}
    config["model"] = model.spec
    manifest = run.manifest
    if manifest is not None:
        manifest = manifest.model_validate(_shortened(manifest.model_dump()))
    teacher = None if run.distilled_from is None else short(run.distilled_from)
    found = {"model": model, "config": _shortened(config), "manifest": manifest, "distilled_from": teacher}
    return run.model_copy(update=found)


def clean_fused(record: FusedRecord, run: RunRecord) -> FusedRecord:
    """A fused model's record as others may read it.

    Args:
        run: As it is published.
    """
    return record.model_copy(
        update={"run": short(record.run), "base": run.model.spec, "base_revision": run.model.revision}
    )


def unnamed(model: ModelRecord) -> ModelRecord:
    """A base that has no name elsewhere: what it was called here, and its hash."""
    return model.model_copy(update={"spec": short(model.spec), "path": ""})


def short(text: str) -> str:
    """The last name of a path; `recorded:` and other providers before it stay. Hub ids and other texts stay whole."""
    match = _SPEC.fullmatch(text)
    if match is None:
        return text
    name = re.split(r"[/\\]", match["path"].rstrip("/\\"))[-1]
    return f"{match['provider'] or ''}{name.lstrip('~.') or 'unnamed'}"


def places_of(run: RunRecord, *folders: Path) -> dict[str, str]:
    """Absolute paths that texts made from a run may quote → what stands in for each; longest first."""
    named = {text.removeprefix(_provider(text)) for text in _strings(run.model_dump())}
    named |= {str(folder.absolute()) for folder in folders}
    found = {text: short(text) for text in named if text.startswith(("/", "~")) and len(Path(text).parts) > 2}
    return dict(sorted(found.items(), key=lambda item: len(item[0]), reverse=True))


def without_places(text: str, places: Mapping[str, str]) -> str:
    """A text with paths shortened, and what is left of the user's home named `~`."""
    for place, instead in places.items():
        text = text.replace(place, instead)
    for home in _homes():
        text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    return text


def clean_json(text: str) -> str:
    """A JSON object of a model's folder; unchanged to the byte where it holds no path of this machine.

    Raises:
        ValueError: It is not JSON.
    """
    value = json.loads(text)
    cleaned = _homeless(value)
    return text if cleaned == value else json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n"


def _homes() -> Collection[str]:
    home = str(Path.home())
    return {home, str(Path(home).resolve())} if len(Path(home).parts) > 1 else ()


def _homeless(value: Any) -> Any:
    """The same with each string that is a path below the user's home cut to its last name, and no other changed."""
    if isinstance(value, dict):
        return {key: _homeless(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_homeless(item) for item in value]
    if isinstance(value, str) and any(value == home or value.startswith(f"{home}/") for home in _homes()):
        return short(value)
    return value


def _provider(text: str) -> str:
    match = _SPEC.fullmatch(text)
    return (match["provider"] or "") if match else ""


def _shortened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_shortened(item) for item in value)
    return short(value) if isinstance(value, str) else value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)
