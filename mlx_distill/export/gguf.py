"""Writes a model in Hugging Face layout as one GGUF file, which llama.cpp and all that rest on it load.

The inverse of `mlx_distill.models.gguf`. Everything is checked before the first byte is written, by the code that reads
such files: names, shapes, completeness, tokens.

Reads: MODEL/{config.json,generation_config.json,model*.safetensors,tokenizer*,README.md}.
Writes: OUT/NAME.gguf, whole or not at all.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlx_distill import layout
from mlx_distill.errors import ModelError
from mlx_distill.export.gguf_metadata import add_sizes, exportable_config, is_tied, rotary_factors
from mlx_distill.export.gguf_tensors import Kind, PlannedTensor, plan_weights, read_weights
from mlx_distill.export.gguf_vocabulary import add_vocabulary, read_student_vocabulary
from mlx_distill.models.folder import check_folder, licence
from mlx_distill.models.gguf_reader import GgufFile, GgufTensor
from mlx_distill.models.gguf_weights import ROPE_FREQUENCIES, plan_tensors
from mlx_distill.progress import SILENT, Progress

if TYPE_CHECKING:
    from gguf import GGUFWriter

#: Folders whose name says nothing of the model in them.
_NAMELESS = {"fused", "model", "hf", "export"}

_HEAD = "lm_head.weight"


def write_gguf(model: Path, out: Path, *, kind: Kind, name: str | None = None, progress: Progress = SILENT) -> Path:
    """Write a model as a GGUF. One tensor at a time is in memory.

    Args:
        model: Folder with dense weights.
        out: Folder of the file; made if need be.
        kind: Type of the matrices.
        name: Of the model; by default that of its folder.

    Returns:
        The file.

    Raises:
        ModelError: The architecture, a setting, a tensor or the tokenizer cannot be said in a GGUF, or a weight is
            missing. Nothing was written.
        ResourceError: It cannot be written, as on a full disk.
    """
    check_folder(model)
    config = exportable_config(model)
    weights = read_weights(model)
    tied = is_tied(config, has_head=any(weight.name == _HEAD for weight in weights))
    plan = plan_weights(weights, config, kind, tied=tied)
    rows = next((tensor.shape[0] for tensor in plan if tensor.name == "token_embd.weight"), 0)
    missing = "model.embed_tokens.weight" if not rows else _HEAD
    if not rows or not (tied or any(tensor.name == "output.weight" for tensor in plan)):
        raise ModelError(f"{model} lacks the weight {missing}.", hint="Download it again.")
    name = _plain(name or model_name(model))
    writer = _describe(model, name, config, rows, kind)
    factors = rotary_factors(config)
    _require_readable(model, writer, plan)
    path = out / f"{name}.gguf"
    layout.require_disk(out, sum(tensor.bytes for tensor in plan) + 50_000_000, what=f"{path.name}")
    with layout.atomic_file(path) as temporary:
        _write(writer, temporary, plan, factors, progress)
    return path


def model_name(model: Path) -> str:
    """A name for a model: that of its folder, or of the nearest above it that is not like any other's."""
    folder = model.resolve()
    names = [folder.name, *(parent.name for parent in folder.parents)]
    return next((name for name in names if name and name not in _NAMELESS), "model")


def _plain(name: str) -> str:
    """A name as it can stand in a file's name and in a Modelfile."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "model"


def _describe(model: Path, name: str, config: dict[str, Any], rows: int, kind: Kind) -> GGUFWriter:
    """A writer that holds all of the metadata, and no file yet."""
    from gguf import GGML_QUANT_VERSION, GGUFWriter, LlamaFileType

    writer = GGUFWriter(None, config["model_type"])
    writer.add_type("model")
    writer.add_name(name)
    if stated := licence(model):
        writer.add_license(stated)
    writer.add_file_type(LlamaFileType.MOSTLY_F16 if kind == "f16" else LlamaFileType.MOSTLY_Q8_0)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_sizes(writer, config)
    add_vocabulary(writer, read_student_vocabulary(model, config, rows))
    return writer


def _require_readable(model: Path, writer: GGUFWriter, plan: list[PlannedTensor]) -> None:
    """Read what would be written as if it were a file, without its values."""
    nothing = np.empty((0, 0), np.uint8)
    tensors = {tensor.name: GgufTensor(tensor.name, tensor.type, tensor.shape, nothing) for tensor in plan}
    metadata = {key: value.value for key, value in writer.kv_data[0].items()}
    plan_tensors(GgufFile(model, metadata, tensors))


def _write(
    writer: GGUFWriter,
    path: Path,
    plan: list[PlannedTensor],
    factors: NDArray[np.float32] | None,
    progress: Progress,
) -> None:
    from gguf import GGMLQuantizationType

    if factors is not None:
        writer.add_tensor_info(ROPE_FREQUENCIES, factors.shape, factors.dtype, factors.nbytes)
    for tensor in plan:
        # The writer asks for the type of what is packed only where the packing changes the shape.
        kind = GGMLQuantizationType[tensor.type]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress.task("Writing the GGUF", len(plan), unit="tensors") as bar:
            if factors is not None:
                writer.write_tensor_data(factors)
            for tensor in plan:
                writer.write_tensor_data(tensor.data())
                bar.advance()
    finally:
        writer.close()
