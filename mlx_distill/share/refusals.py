"""What is not published, whatever is asked: found before a word goes to the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_distill import layout
from mlx_distill.errors import InputError, ModelError
from mlx_distill.manifest import Manifest, TeacherTerms
from mlx_distill.quality.credentials import find_credentials
from mlx_distill.run_records import RunRecord
from mlx_distill.share.base import Base, name_base

#: Characters that are searched at once: lines are put together up to it, so that a long file costs no memory.
_PIECE = 1 << 18


def require_base(run: RunRecord, root: Path, *, needed: bool) -> Base | None:
    """The base model by a name that others can use.

    Args:
        root: Folder of the run.
        needed: Whether it cannot be done without: an adapter is worth nothing beside another base.

    Raises:
        ModelError: It has none, and is needed.
    """
    base = name_base(run.model)
    if base is None and needed:
        what = {"folder": "a folder", "gguf": "a GGUF file"}.get(run.model.source, "a model")
        raise ModelError(
            f"The base of {root} cannot be named to others: it was {what} of this machine ({run.model.spec}), and an "
            "adapter is of use with its base alone.",
            hint="Train on the model by its Hub id (organisation/name), or publish the whole model:  --what fused",
        )
    return base


def require_shareable_rows(run: RunRecord, data: Path) -> TeacherTerms | None:
    """The terms of the training rows' teacher; None where the rows name none.

    Raises:
        InputError: The terms forbid to publish the rows, as a permission to train on them is none to pass them on.
    """
    manifests = [run.manifest]
    on_disk = layout.DataFolder(data).manifest
    if on_disk.exists():
        manifests.append(layout.read_record(on_disk, Manifest))
    terms = [manifest.terms for manifest in manifests if manifest is not None]
    for found in terms:
        if found.requires_acceptance:
            raise InputError(
                f"the rows of {data} are answers of {found.teacher}, whose terms ({found.licence}) do not let them be "
                f"published: {found.summary}",
                path=data,
                hint="Publish the adapter without them: leave --data out.",
            )
    return terms[0] if terms else None


def require_no_credentials(name: str, text: str, *, rows: bool) -> None:
    """Refuse a text that seems to hold a credential. What it holds is not quoted.

    Args:
        name: Of the file, for the message.
        rows: Whether it is JSONL: each line is then also read as what its strings say.

    Raises:
        InputError: Names the file, the line, and the kinds of credentials.
    """
    for first, piece in _pieces(text) if rows else [(1, text)]:
        if kinds := _credentials(piece, rows=rows):
            lines = enumerate(piece.splitlines(), start=first)
            raise InputError(
                f"seems to hold a credential ({', '.join(kinds)}), and is not published.",
                path=name,
                line=next((number for number, row in lines if _credentials(row, rows=True)), first) if rows else None,
                hint="Take it out, and make the credential invalid: it lies on this disk in plain text.",
            )


def _credentials(text: str, *, rows: bool) -> list[str]:
    spoken = map(_spoken, text.splitlines() if rows else [text])
    return find_credentials("\n".join([text, *spoken]))


def _pieces(text: str) -> Iterator[tuple[int, str]]:
    """A text in whole lines, a few at a time, each piece with the number of its first line."""
    lines: list[str] = []
    size, first, number = 0, 1, 0
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        lines.append(line)
        size += len(line)
        if size >= _PIECE:
            yield first, "".join(lines)
            lines, size, first = [], 0, number + 1
    if lines:
        yield first, "".join(lines)


def _spoken(text: str) -> str:
    """All strings of a JSON text, one below the other, without the escapes that can hide a credential."""
    try:
        return "\n".join(_strings(json.loads(text)))
    except (ValueError, RecursionError):
        return ""


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
