"""The step `export`.

Reads: adapters/RUN/{run.json,adapters.safetensors,adapter_config.json,fused/} and the base model; or a fused model.
Writes: adapters/RUN/export/FORMAT/, or another folder: the files of that format and mlx_distill_export.json.

The adapter goes to PEFT; the model fused from it to transformers (`hf`), mlx-lm (`mlx`), llama.cpp (`gguf`) and Ollama.
Each is loaded by what it is for and held against the student, and is not written where that says something else.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_distill import layout
from mlx_distill.agreement import Agreement
from mlx_distill.config import ExportConfig
from mlx_distill.errors import ConfigError, FolderError, InputError, ModelError
from mlx_distill.export.models import is_quantized, weight_bytes
from mlx_distill.export.peft import read_adapter
from mlx_distill.export.records import ExportRecord
from mlx_distill.export.verify import CONSUMERS, compare, require_agreement
from mlx_distill.export.writing import Written, write
from mlx_distill.models.folder import check_folder, read_config
from mlx_distill.probing import MAX_POSITIONS, make_probe
from mlx_distill.progress import SILENT, Progress
from mlx_distill.run_records import RunRecord
from mlx_distill.runs import FusedRecord, read_fused, read_run, require_own_folder, resolve_base

#: For what the models say, inside the folder that is being written; gone before that takes its name.
_WORK = ".work"

#: How much larger a 4-bit model may become when it is not quantized any more.
_DEQUANTIZED = 4.5


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        run: Folder of the run; None where it is not there any more.
        record: Of the run.
        model: Folder of the fused model; for PEFT, of the base.
        fused: What the fused model was made from; None for PEFT.
    """

    run: Path | None
    record: RunRecord | None
    model: Path
    fused: FusedRecord | None


def export_folder(config: ExportConfig) -> Path:
    """Where the export goes: beside a fused model that lies elsewhere than in its run."""
    if config.out is not None:
        return config.out
    run = _run_of(config.source)
    if run is None:
        return config.source.absolute().parent / f"{config.source.absolute().name}-{config.to}"
    return layout.RunFolder(run).export(config.to)


def export(config: ExportConfig, progress: Progress = SILENT) -> ExportRecord:
    """Write an adapter or a fused model in another tool's format.

    Raises:
        ConfigError: A setting that the format does not have.
        InputError: The run or the fused model is missing, not finished or damaged.
        FolderError: The target holds something that is not an export of ours, or the run is in use.
        ModelError: The adapter and its base do not belong together, the format has no name for what is in it, or its
            consumer says something else than the student.
        ResourceError: Not enough disk.
    """
    _require_options(config)
    out = export_folder(config)
    require_own_folder(out, layout.export_record(out), "an export")
    if config.source.resolve().is_relative_to(out.resolve()):
        raise FolderError(f"{out} holds {config.source}, which it would replace.", hint="Choose another --out.")
    source = find_source(config, progress)
    needed = _needed(config, source)
    layout.require_disk(out.parent, needed, what="The export")
    with ExitStack() as stack:
        if (run := _run_of(config.source)) is not None:
            stack.enter_context(layout.lock(run))
            layout.sweep(layout.RunFolder(run).export(config.to).parent)
        stack.enter_context(_without_trace(out.parent))
        temporary = stack.enter_context(layout.atomic_folder(out))
        work = temporary / _WORK
        work.mkdir()
        with progress.task(f"Writing {config.to}"):
            written = write(config, source.model, source.run, source.record, temporary, work)
        unverified = _unverified(config)
        found = None if unverified else _verify(config, source, written, work, progress)
        shutil.rmtree(work)
        record = _record(config, source, written, found, unverified, temporary)
        layout.write_text(layout.export_record(temporary), record.model_dump_json(indent=2, exclude_none=True) + "\n")
    return record


def find_source(config: ExportConfig, progress: Progress = SILENT) -> Source:
    """What a configuration exports.

    Raises:
        InputError, ModelError: It is missing or damaged, or its base is not what it was.
        ConfigError: PEFT takes an adapter, and this is a whole model.
    """
    folder = config.source
    if layout.fused_record(folder).is_file():
        fused = layout.read_record(layout.fused_record(folder), FusedRecord)
        if config.to == "peft":
            raise ConfigError(
                f"to = peft: {folder} is a whole model, in which there is no adapter any more.",
                hint=f"Name the run instead:  mlx-distill export {fused.run} --to peft",
            )
        check_folder(folder)
        run = Path(fused.run)
        with suppress(InputError):
            record = read_run(run)
            # Or it is another one by now.
            if layout.file_sha256(layout.RunFolder(run).adapter) == fused.adapter_sha256:
                return Source(run, record, folder, fused)
        return Source(None, None, folder, fused)
    if (folder / "config.json").is_file() and not layout.RunFolder(folder).record.exists():
        raise InputError(
            "this model was not fused here: it has no mlx_distill_fused.json.",
            path=folder,
            hint="Name the folder of a run, or of a model that  mlx-distill fuse  made.",
        )
    record = read_run(folder)
    if config.to == "peft":
        return Source(folder, record, _base(folder, record, progress), None)
    model = layout.RunFolder(folder).fused
    fused = read_fused(model, folder)
    check_folder(model)
    return Source(folder, record, model, fused)


def _run_of(source: Path) -> Path | None:
    """The run that a source is or lies in."""
    if layout.RunFolder(source).record.is_file():
        return source
    inside = source.name == layout.RunFolder(source.parent).fused.name
    return source.parent if inside and layout.RunFolder(source.parent).record.is_file() else None


def _base(run: Path, record: RunRecord, progress: Progress) -> Path:
    # Before the base is fetched: a damaged adapter is none the better for it.
    read_adapter(run)
    return Path(resolve_base(run, record, progress).path)


def _require_options(config: ExportConfig) -> None:
    if config.quantize is not None and config.to != "mlx":
        raise ConfigError(
            f"quantize = {config.quantize}: only an mlx export is quantized so.",
            hint="For gguf and ollama choose --gguf-type q8_0; for the others leave --quantize out.",
        )
    if config.gguf_type != "f16" and config.to not in ("gguf", "ollama"):
        raise ConfigError(
            f"gguf_type = {config.gguf_type}: {config.to} has no such type.", hint="Leave --gguf-type out."
        )


def _needed(config: ExportConfig, source: Source) -> int:
    """Bytes that the export and its check take at most."""
    weights = weight_bytes(source.model)
    dense = int(weights * (_DEQUANTIZED if is_quantized(source.model) else 1))
    written = {"peft": dense if dense > weights else 0, "mlx": weights, "hf": dense}.get(config.to, 2 * dense)
    vocabulary = read_config(source.model).get("vocab_size")
    logits = 2 * 4 * MAX_POSITIONS * (vocabulary if isinstance(vocabulary, int) else 0)
    return written + (logits if config.verify else 0)


def _unverified(config: ExportConfig) -> str | None:
    """Why the export will not be looked at; None where it will."""
    if not config.verify:
        return "not asked for"
    consumer = CONSUMERS[config.to]
    missing = consumer.missing()
    return missing and f"{missing} is not installed: pip install 'mlx-distill[{consumer.extra}]'"


def _verify(config: ExportConfig, source: Source, written: Written, work: Path, progress: Progress) -> Agreement:
    data = source.record.config.get("data") if source.record is not None else None
    try:
        probe = make_probe(source.model, Path(data) if isinstance(data, str) else None, progress=progress)
    except ModelError as error:
        raise ModelError(f"The export cannot be checked: {error.message}", hint="Unchecked:  --no-verify") from None
    name = CONSUMERS[config.to].describe()
    found = compare(probe, written.student, written.exported, work / "said", progress, name=name)
    require_agreement(found, written.limit, name)
    return found


def _record(
    config: ExportConfig,
    source: Source,
    written: Written,
    found: Agreement | None,
    unverified: str | None,
    folder: Path,
) -> ExportRecord:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    model = source.record.model if source.record is not None else None
    fused = source.fused
    if fused is not None:
        base, revision, licence, sha256 = fused.base, fused.base_revision, fused.licence, fused.adapter_sha256
    else:
        assert source.run is not None and model is not None
        base, revision, licence = model.spec, model.revision, model.licence
        sha256 = layout.file_sha256(layout.RunFolder(source.run).adapter)
    return ExportRecord(
        kind=config.to,
        weights=written.weights,
        source=str(config.source),
        base=base,
        base_source=model.source if model is not None else None,
        base_revision=revision,
        licence=licence,
        adapter_sha256=sha256,
        consumer=None if found is None else CONSUMERS[config.to].describe(),
        agreement=found,
        limit=written.limit if found is not None else None,
        unverified=unverified,
        notes=written.notes,
        bytes=sum(path.stat().st_size for path in files),
        files={path.relative_to(folder).as_posix(): layout.file_sha256(path) for path in files},
    )


@contextmanager
def _without_trace(parent: Path) -> Iterator[None]:
    """Where nothing comes of it, a folder that was made to hold the export goes too."""
    there = parent.exists()
    try:
        yield
    except BaseException:
        if not there:
            with suppress(OSError):
                parent.rmdir()
        raise
