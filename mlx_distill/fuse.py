"""The step `fuse`.

Reads: adapters/RUN/{adapters.safetensors,adapter_config.json,run.json} and the base model.
Writes: adapters/RUN/fused/, a whole model in Hugging Face layout.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from mlx_distill import layout
from mlx_distill.config import FuseConfig
from mlx_distill.errors import ModelError
from mlx_distill.models.resolve import resolve
from mlx_distill.progress import SILENT, Progress
from mlx_distill.runs import FusedRecord, read_run, require_own_folder

#: Raised when a change makes the same adapter give another fused model.
CODE_FORMAT = 1

#: What a model's folder holds beside weights and configuration. Never code, never another format's weights.
_COMPANIONS = (
    "tokenizer*",
    "*.jinja",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "LICENSE*",
    "*.tiktoken",
)


def fused_folder(config: FuseConfig) -> Path:
    """Where the fused model goes."""
    return config.out or layout.RunFolder(config.run).fused


def fuse(config: FuseConfig, progress: Progress = SILENT) -> FusedRecord:
    """Merge a run's adapter into its base model.

    Raises:
        InputError: The run is missing or not finished.
        FolderError: The target holds something that is not a fused model of ours.
        ModelError: Base and adapter do not belong together.
        ResourceError: Not enough disk.
    """
    run = read_run(config.run)
    files = layout.RunFolder(config.run)
    out = fused_folder(config)
    require_own_folder(out, layout.fused_record(out), "a fused model")
    base = resolve(run.model.spec, progress=progress)
    if base.revision != run.model.revision:
        raise ModelError(
            f"{run.model.spec} is not what it was when {config.run} was trained on it "
            f"({run.model.revision} then, {base.revision} now).",
            hint="Bring that revision back, or train again.",
        )
    size = sum(f.stat().st_size for f in Path(base.path).glob("*.safetensors"))
    layout.require_disk(out.parent, int(size * 1.05), what="The fused model")
    with layout.lock(config.run):
        layout.sweep(config.run)
        with layout.atomic_folder(out) as temporary, progress.task(f"Fusing {base.name}"):
            from mlx_distill.backends.mlx.fusing import fuse_into

            layers = fuse_into(Path(base.path), config.run, temporary)
            for pattern in _COMPANIONS:
                for file in Path(base.path).glob(pattern):
                    shutil.copyfile(file, temporary / file.name)
            record = FusedRecord(
                run=str(config.run),
                adapter_sha256=layout.file_sha256(files.adapter),
                base=run.model.spec,
                base_revision=run.model.revision,
                licence=run.model.licence,
                layers=layers,
                bytes=sum(f.stat().st_size for f in temporary.glob("*.safetensors")),
            )
            layout.write_text(
                layout.fused_record(temporary), record.model_dump_json(indent=2, exclude_none=True) + "\n"
            )
    return record
