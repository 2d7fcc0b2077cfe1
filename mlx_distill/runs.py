"""What the steps after training take of a run: its record, its base, and the record of the model fused from it.

Reads: adapters/RUN/{run.json,adapters.safetensors}, FUSED/mlx_distill_fused.json.  Writes: nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from mlx_distill import layout
from mlx_distill.errors import FolderError, InputError, ModelError
from mlx_distill.models.resolve import resolve_again
from mlx_distill.progress import SILENT, Progress
from mlx_distill.records import ModelRecord, Record
from mlx_distill.run_records import FuseCheck, RunRecord


class FusedRecord(Record):
    """Beside the weights of a fused model: what it was made from.

    Attributes:
        adapter_sha256: Of the adapter that went in.
        base: The base model, as the run named it.
        layers: How many linear layers were changed.
        bytes: Size of the weights.
        check: How it was held against base and adapter; None of one made before that was done.
    """

    format: Literal[1] = 1
    run: str
    adapter_sha256: str
    base: str
    base_revision: str | None = None
    licence: str | None = None
    layers: int
    bytes: int
    check: FuseCheck | None = None


def read_run(root: Path) -> RunRecord:
    """The record of a finished run.

    Raises:
        InputError: There is no such run, or it has no adapter yet.
    """
    folder = layout.RunFolder(root)
    record = layout.read_record(folder.record, RunRecord, hint="Train first:  mlx-distill train --help")
    if record.status != "finished" or not folder.adapter.exists():
        raise InputError(
            "this run is not finished.",
            path=root,
            hint="The same  mlx-distill train  command goes on with it. With --finish, its best adapter so far is the "
            "result.",
        )
    return record


def resolve_base(root: Path, run: RunRecord, progress: Progress = SILENT) -> ModelRecord:
    """The model that a run was trained on, fetched if need be; of the Hub, at the commit that it was then.

    Args:
        root: Folder of the run.

    Raises:
        ModelError: It cannot be found, or is another than it was.
        ResourceError: It does not fit on the disk.
    """
    base = resolve_again(run.model, progress=progress)
    if base.revision != run.model.revision:
        raise ModelError(
            f"{run.model.spec} is not what it was when {root} was trained on it "
            f"({run.model.revision} then, {base.revision} now).",
            hint="Bring that revision back, or train again.",
        )
    return base


def read_fused(folder: Path, run: Path) -> FusedRecord:
    """The record of the model that was fused from a run.

    Args:
        folder: Of the fused model.
        run: Folder of the run.

    Raises:
        InputError: There is none.
        ModelError: It was made from an earlier adapter.
    """
    hint = f"Make it:  mlx-distill fuse {run}"
    record = layout.read_record(layout.fused_record(folder), FusedRecord, hint=hint)
    if record.adapter_sha256 != layout.file_sha256(layout.RunFolder(run).adapter):
        raise ModelError(f"{folder} was fused from another adapter than {run} now holds.", hint=hint)
    return record


def require_own_folder(out: Path, marker: Path, what: str) -> None:
    """Refuse to replace a folder that holds something else.

    Args:
        out: May be missing, empty, or hold an earlier result.
        marker: The file in it that says so.
        what: The result, with its article.

    Raises:
        FolderError: It holds something else.
    """
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() and not marker.exists():
        raise FolderError(f"{out} exists and is not {what} of ours.", hint="Choose another --out.")
