"""Writes an export's files, and says how they are to be looked at."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mlx_distill.config import ExportConfig
from mlx_distill.export.models import copy_companions, copy_model, is_quantized
from mlx_distill.export.peft import base_name, read_adapter, write_peft
from mlx_distill.export.verify import EXACT, ROUNDED_8, ROUNDED_16, Model
from mlx_distill.run_records import RunRecord


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        weights: What they are stored as.
        student: What the export is held against.
        exported: The export, as its consumer loads it.
        limit: The largest divergence that is passed, in nats a position; None where any is.
        notes: What one should know before using it.
    """

    weights: str
    student: Model
    exported: Model
    limit: float | None
    notes: tuple[str, ...] = field(default=())


def write(
    config: ExportConfig, model: Path, run: Path | None, record: RunRecord | None, out: Path, work: Path
) -> Written:
    """Write an export.

    Args:
        model: The fused model; for PEFT the base.
        run: The run, with its record; only PEFT needs it.
        out: An empty folder but for `work`.
        work: For what the check needs and the export does not.

    Raises:
        ModelError: The format has no name for what is in the model.
        ResourceError: The disk is full.
    """
    if config.to == "peft":
        assert run is not None and record is not None
        return _peft(model, run, record, out, work)
    if config.to == "hf":
        return _hf(model, out)
    if config.to == "mlx":
        return _mlx(model, out, config.quantize)
    return _gguf(config, model, out, work)


def _peft(base: Path, run: Path, record: RunRecord, out: Path, work: Path) -> Written:
    from mlx_distill.backends.mlx.linears import Layers

    adapter = read_adapter(run)
    Layers(base).require_adapter(run)
    write_peft(adapter, record, out)
    notes, dense = [], base
    name, _ = base_name(record.model)
    if is_quantized(base):
        from mlx_distill.backends.mlx.converting import write_dense

        # In float32 it is the very base that the adapter was trained on.
        dense = work / "base"
        dense.mkdir()
        write_dense(base, dense, dtype="float32")
        notes.append(f"Trained on {name}, quantized for MLX; PEFT needs the model that it was made from.")
    elif record.model.source in ("gguf", "bundled"):
        notes.append(f"Trained on weights from a GGUF file; those of {name} on the Hub can differ by its rounding.")
    return Written("float32", Model("mlx", base, run), Model("torch", dense, out), EXACT, tuple(notes))


def _hf(model: Path, out: Path) -> Written:
    if not is_quantized(model):
        copy_model(model, out)
        return Written("as fused", Model("mlx", model), Model("torch", out), EXACT)
    from mlx_distill.backends.mlx.converting import write_dense

    write_dense(model, out)
    copy_companions(model, out)
    return Written("dequantized", Model("mlx", model), Model("torch", out), ROUNDED_16)


def _mlx(model: Path, out: Path, bits: str | None) -> Written:
    if bits is None:
        copy_model(model, out)
        return Written("as fused", Model("mlx", model), Model("mlx", out), EXACT)
    from mlx_distill.backends.mlx.converting import write_quantized

    write_quantized(model, out, int(bits))
    copy_companions(model, out)
    return Written(f"{bits} bits", Model("mlx", model), Model("mlx", out), None)


def _gguf(config: ExportConfig, model: Path, out: Path, work: Path) -> Written:
    from mlx_distill.export.gguf import model_name, write_gguf

    dense = model
    if is_quantized(model):
        from mlx_distill.backends.mlx.converting import write_dense

        dense = work / "dense"
        dense.mkdir()
        write_dense(model, dense)
        copy_companions(model, dense)
    file = write_gguf(dense, out, kind=config.gguf_type, name=model_name(model))
    if config.to == "ollama":
        from mlx_distill.export.ollama import write_modelfile

        write_modelfile(dense, file, out)
    limit = ROUNDED_16 if config.gguf_type == "f16" else ROUNDED_8
    return Written(config.gguf_type, Model("mlx", model), Model("llama_cpp", file), limit)
