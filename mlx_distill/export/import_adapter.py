"""The step `import-adapter`.

Reads: a folder that PEFT wrote (adapter_config.json, adapter_model.safetensors) and the base model.
Writes: adapters/RUN/{adapters.safetensors,adapter_config.json,run.json}.

mlx-lm puts an adapter on the same matrices of each of the last layers. What PEFT leaves out of those gets an update of
zero, which changes nothing. What mlx-lm does not compute is refused: no adapter is taken for less than it is.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from mlx_distill import __version__, layout
from mlx_distill.backends.adapters import write_adapter_config
from mlx_distill.config import ImportAdapterConfig, TrainConfig
from mlx_distill.errors import InputError, ModelError, OccupiedError
from mlx_distill.export.peft import Adapter, exact_scale, scale_of
from mlx_distill.export.peft_reading import PeftConfig, read_config, read_modules
from mlx_distill.export.records import ExportRecord, ImportRecord
from mlx_distill.models.hub import HUB_ID
from mlx_distill.models.resolve import resolve
from mlx_distill.progress import SILENT, Progress
from mlx_distill.records import ModelRecord, content_hash
from mlx_distill.run_records import RunRecord

if TYPE_CHECKING:
    from mlx_distill.backends.mlx.linears import Layers

#: What `run.json` says trained it.
BACKEND = "peft"

_COMMIT = re.compile(r"[0-9a-f]{40}")

_OTHER_BASE = "Name the model that it was trained on:  --model FOLDER-OR-HUB-ID"


@dataclass(frozen=True)
class _Fitted:
    """An adapter as mlx-lm can express it.

    Attributes:
        keys: The matrices of a layer that it sits on; None for all.
        layers: How many, counted from the last.
        filled: Matrices that have an update of zero.
    """

    adapter: Adapter
    keys: list[str] | None
    layers: int
    filled: int


def import_adapter(config: ImportAdapterConfig, progress: Progress = SILENT) -> ImportRecord:
    """Make a run of an adapter that PEFT wrote.

    Raises:
        InputError: A file is missing, damaged or a pickle, or says what mlx-lm does not compute.
        ModelError: The base cannot be found, or is not the adapter's.
        OccupiedError: The folder of the run holds something else.
        FolderError: Another process uses it.
    """
    described = read_config(config.source)
    modules, metadata = read_modules(config.source, described)
    scale = exact_scale(scale_of(described.lora_alpha, described.r, rslora=described.use_rslora), metadata)
    adapter = Adapter(modules, described.use_dora, described.r, scale, described.lora_dropout)
    model = _base(config, described, progress)
    identity = _identity(adapter, model)
    earlier = _earlier(config.run, identity)
    from mlx_distill.backends.mlx.linears import Layers

    layers = Layers(Path(model.path))
    fitted = _fit(adapter, layers, config.source, model)
    if earlier is None:
        _write(config.run, fitted, layers, model, described, identity)
    return ImportRecord(
        run=str(config.run),
        model=model,
        kind="dora" if adapter.dora else "lora",
        rank=adapter.rank,
        scale=adapter.scale,
        layers=fitted.layers,
        matrices=len(modules),
        filled=fitted.filled,
        earlier=earlier is not None,
    )


def _base(config: ImportAdapterConfig, described: PeftConfig, progress: Progress) -> ModelRecord:
    """The base model, held against what is recorded of it."""
    export = layout.export_record(config.source)
    ours = layout.read_record(export, ExportRecord) if export.is_file() else None
    spec = config.model or _named_base(config.source, described, ours)
    model = resolve(spec, progress=progress)
    # Of each source, the surest: commits are told apart from hashes of files.
    known = {"hub": described.revision} if described.revision and _COMMIT.fullmatch(described.revision) else {}
    if ours is not None and ours.base_source is not None and ours.base_revision is not None:
        known[ours.base_source] = ours.base_revision
    if (recorded := known.get(model.source, model.revision)) != model.revision:
        raise ModelError(
            f"{config.source} is an adapter for another model than {spec}: for revision {recorded}, and this is "
            f"{model.revision}.",
            hint=_OTHER_BASE,
        )
    return model


def _named_base(source: Path, described: PeftConfig, ours: ExportRecord | None) -> str:
    """The base that an adapter names."""
    spec, revision = described.base_model_name_or_path, described.revision
    if ours is not None and ours.base_source in ("hub", "bundled"):
        # More than PEFT has a place for: that it was our own copy of a model of the Hub.
        spec, revision = ours.base, None if ours.base_source == "bundled" else ours.base_revision
    if not spec:
        raise InputError("this adapter names no base model.", path=source, hint=_OTHER_BASE)
    if ".." in Path(spec).parts:
        raise InputError(
            f"this adapter names its base by a path that climbs out of its folder: {spec}",
            path=source,
            hint=_OTHER_BASE,
        )
    is_name = HUB_ID.fullmatch(spec) is not None and not Path(spec).exists()
    return f"{spec}@{revision}" if revision and is_name and "@" not in spec else spec


def _identity(adapter: Adapter, model: ModelRecord) -> str:
    """Hash of the adapter and the base it is for."""
    return content_hash(
        {
            "model": model.revision,
            "settings": [adapter.dora, adapter.rank, adapter.scale.hex(), adapter.dropout],
            "weights": {
                f"{module}.{leaf}": hashlib.sha256(values.tobytes()).hexdigest()
                for module, leaves in adapter.modules.items()
                for leaf, values in leaves.items()
            },
        }
    )


def _earlier(run: Path, identity: str) -> RunRecord | None:
    """The record of this very adapter, imported before; None where the folder is free."""
    if not run.exists():
        return None
    if not run.is_dir():
        raise OccupiedError(f"{run} is a file.", hint="Choose another --run.")
    # Refuses a folder in which a training has just begun.
    with layout.lock(run):
        if not any(path.name != ".lock" for path in run.iterdir()):
            return None
        record = layout.RunFolder(run).record
        if record.is_file():
            found = layout.read_record(record, RunRecord)
            if found.identity == identity and found.status == "finished":
                return found
    raise OccupiedError(f"{run} holds something else already.", hint="Choose another --run.")


def _fit(adapter: Adapter, layers: Layers, source: Path, model: ModelRecord) -> _Fitted:
    """Lay an adapter out as mlx-lm has it, with zeros where PEFT has nothing.

    Raises:
        ModelError: The base has no such matrix, or one of another shape.
    """
    for name, leaves in adapter.modules.items():
        matrix = layers.matrices.get(name)
        if matrix is None:
            raise ModelError(
                f"{source} adapts {name}, and {model.spec} has no such matrix in its layers.",
                hint=_OTHER_BASE,
            )
        shape = (leaves["lora_a"].shape[0], leaves["lora_b"].shape[1])
        if shape != (matrix.inputs, matrix.outputs):
            raise ModelError(
                f"{source} is an adapter for another model than {model.spec}: {name} takes {shape[0]} values to "
                f"{shape[1]} there, and {matrix.inputs} to {matrix.outputs} here.",
                hint=_OTHER_BASE,
            )
        if adapter.rank > min(shape):
            raise ModelError(
                f"{source}: rank {adapter.rank} does not fit {name}, which is of rank {min(shape)} at most.",
                hint="Train it with a lower rank.",
            )
    first = min(layers.matrices[name].layer for name in adapter.modules)
    keys = {layers.matrices[name].key for name in adapter.modules}
    place = {name: matrix for name, matrix in layers.matrices.items() if matrix.layer >= first}
    missing = sorted(name for name, matrix in place.items() if matrix.key in keys and name not in adapter.modules)
    norms = layers.row_norms(missing) if adapter.dora else {}
    modules = dict(adapter.modules)
    for name in missing:
        matrix = place[name]
        modules[name] = {
            "lora_a": np.zeros((matrix.inputs, adapter.rank), np.float32),
            "lora_b": np.zeros((adapter.rank, matrix.outputs), np.float32),
            **({"m": norms[name]} if adapter.dora else {}),
        }
    every = keys == {matrix.key for matrix in place.values()}
    whole = Adapter(modules, adapter.dora, adapter.rank, adapter.scale, adapter.dropout)
    return _Fitted(whole, None if every else sorted(keys), layers.count - first, len(missing))


def _write(
    run: Path, fitted: _Fitted, layers: Layers, model: ModelRecord, described: PeftConfig, identity: str
) -> None:
    adapter = fitted.adapter
    tensors = {
        f"{module}.{leaf}": values for module, leaves in adapter.modules.items() for leaf, values in leaves.items()
    }
    parameters: dict[str, Any] = {"rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout}
    if fitted.keys is not None:
        parameters["keys"] = fitted.keys
    settings = {
        "fine_tune_type": "dora" if adapter.dora else "lora",
        "num_layers": fitted.layers,
        "lora_parameters": parameters,
    }
    config = TrainConfig(
        data=Path("data"),
        run=run,
        model=model.spec,
        adapter="dora" if adapter.dora else "lora",
        rank=adapter.rank,
        scale=described.lora_alpha / described.r,
        rslora=described.use_rslora,
        dropout=adapter.dropout,
        layers="all" if fitted.layers == layers.count else fitted.layers,
        targets="all" if fitted.keys is None else ",".join(fitted.keys),
    )
    record = RunRecord(
        identity=identity,
        status="finished",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        backend=BACKEND,
        device="",
        model=model,
        # What was not given is not known: not the data, not a learning rate.
        config=config.model_dump(mode="json", include=config.model_fields_set - {"data"}),
        splits={},
        trainable_parameters=sum(values.size for values in tensors.values()),
    )
    layout.require_disk(run.parent, sum(values.nbytes for values in tensors.values()), what="The adapter")
    with layout.atomic_folder(run) as temporary:
        files = layout.RunFolder(temporary)
        save_file(tensors, files.adapter, metadata={"format": "mlx"})
        write_adapter_config(files, settings, config)
        layers.require_adapter(temporary)
        layout.write_text(files.record, record.model_dump_json(indent=2, exclude_none=True) + "\n")
