"""The weights of a model in Hugging Face layout as llama.cpp's tensors, one in memory at a time.

Names come from the `gguf` package's map. Matrices take the wanted type; vectors are float32, as llama.cpp has them. The
rows of q and k of `llama` models are interleaved pairwise (`mlx_distill.models.gguf_weights` undoes it).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mlx_distill.errors import ModelError
from mlx_distill.models.safetensors import to_storage

Kind = Literal["f16", "q8_0"]

#: Element types of safetensors that weights may have; numpy has no bfloat16, whose bits are the upper half of a
#: float32's.
_TYPES: Mapping[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}

#: Values converted at once: 16 MB of float32.
_CHUNK = 1 << 22

#: Computed anew by whoever loads the model; old checkpoints hold it.
_NO_WEIGHT = ".rotary_emb.inv_freq"

_OTHER_WAY = "Export it with --to hf, and convert that with llama.cpp's convert_hf_to_gguf.py."


@dataclass(frozen=True)
class Weight:
    """A tensor as it lies in a safetensors file.

    Attributes:
        type: "F32", "F16" or "BF16".
        offset: Of its data in the file, in bytes.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    def matrix(self) -> NDArray[Any]:
        """Its bits, mapped from the file, (rows, columns); of a vector, columns is 1."""
        rows = self.shape[0]
        columns = math.prod(self.shape) // max(rows, 1) if len(self.shape) > 1 else 1
        return np.memmap(self.path, _TYPES[self.type], mode="r", offset=self.offset, shape=(rows, columns))


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written.

    Attributes:
        name: llama.cpp's.
        type: Name of its GGML type: "F32", "F16" or "Q8_0".
        heads: Of the rows, where they are to be interleaved; else 0.
    """

    name: str
    type: str
    source: Weight
    heads: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows first."""
        return self.source.shape

    @property
    def bytes(self) -> int:
        """Size of its data."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[self.type]]
        return math.prod(self.shape) // int(block) * int(size)

    def data(self) -> NDArray[Any]:
        """What is written, (rows, …), in the order of the file.

        Raises:
            ModelError: A value is no number, or does not fit the type.
        """
        bits = self.source.matrix()
        order = interleaved_rows(len(bits), self.heads) if self.heads else np.arange(len(bits))
        pack = _packer(self.type)
        step = max(1, _CHUNK // bits.shape[1])
        packed: NDArray[Any] | None = None
        for start in range(0, len(bits), step):
            rows = slice(start, start + step)
            values = _to_float32(bits[order[rows]], self.source.type)
            if not np.isfinite(values).all():
                raise ModelError(f"{self.source.path}: {self.source.name} holds values that are no numbers.")
            try:
                chunk = pack(values)
            except OverflowError as error:
                raise ModelError(
                    f"{self.source.path}: {self.source.name}: {error}.", hint="Export it with --gguf-type q8_0."
                ) from None
            if packed is None:
                packed = np.empty((len(bits), *chunk.shape[1:]), chunk.dtype)
            packed[rows] = chunk
        assert packed is not None
        return packed


def read_weights(model: Path) -> list[Weight]:
    """Every tensor of the model's safetensors files, in their order there. `check_folder` must have passed it.

    Raises:
        ModelError: One is of a type that is not a float of at most 32 bits, or is there twice.
    """
    found: dict[str, Weight] = {}
    for path in sorted(model.glob("model*.safetensors")):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(length))
        for name, entry in sorted(_entries(head), key=lambda item: item[1]["data_offsets"][0]):
            if entry["dtype"] not in _TYPES:
                raise ModelError(
                    f"{path}: {name} is of the type {entry['dtype']}; a GGUF is made of F32, F16 or BF16 weights.",
                    hint="Quantized weights cannot be exported: fuse the run anew without quantizing.",
                )
            if name in found:
                raise ModelError(f"{path} and {found[name].path.name} both hold {name}.", hint="Take one of them away.")
            offset = 8 + length + entry["data_offsets"][0]
            found[name] = Weight(name, entry["dtype"], tuple(entry["shape"]), path, offset)
    return list(found.values())


def _entries(head: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    return ((name, entry) for name, entry in head.items() if name != "__metadata__")


def plan_weights(weights: list[Weight], config: Mapping[str, Any], kind: Kind, *, tied: bool) -> list[PlannedTensor]:
    """What each weight becomes.

    Args:
        config: The model's `config.json`.
        tied: Whether the embedding is the output matrix too; one that is there all the same is left out.

    Raises:
        ModelError: A weight is none of this architecture's.
    """
    from gguf import MODEL_ARCH, get_tensor_name_map

    architecture = config["model_type"]
    names = get_tensor_name_map(MODEL_ARCH[architecture.upper()], config["num_hidden_layers"])
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config.get("num_key_value_heads") or config["num_attention_heads"],
    }
    plan = []
    for weight in weights:
        if weight.name.endswith(_NO_WEIGHT) or (tied and weight.name == "lm_head.weight"):
            continue
        name = names.get_name(weight.name, try_suffixes=(".weight", ".bias"))
        if name is None or len(weight.shape) not in (1, 2):
            raise ModelError(
                f"{weight.path}: {weight.name} {weight.shape} is no weight of a plain {architecture} model.",
                hint=_OTHER_WAY,
            )
        interleaved = heads.get(name.rpartition(".")[0].rpartition(".")[2], 0) if architecture == "llama" else 0
        if interleaved and weight.shape[0] % (2 * interleaved):
            raise ModelError(f"{weight.path}: the {weight.shape[0]} rows of {weight.name} are not {interleaved} heads.")
        plan.append(PlannedTensor(name, _type(weight, kind), weight, interleaved))
    return plan


def _type(weight: Weight, kind: Kind) -> str:
    if len(weight.shape) == 1:
        return "F32"
    # As llama.cpp's own conversion does where rows are no whole blocks of 32.
    return "Q8_0" if kind == "q8_0" and weight.shape[-1] % 32 == 0 else "F16"


def interleaved_rows(rows: int, heads: int) -> NDArray[np.intp]:
    """Which row of Hugging Face's is each of llama.cpp's: of a head, the first of each half, the second of each, …

    Returns:
        (rows,)
    """
    order: NDArray[np.intp] = np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)
    return order


def _to_float32(bits: NDArray[Any], kind: str) -> NDArray[np.float32]:
    if kind == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.astype(np.float32, copy=False)


def _packer(kind: str) -> Callable[[NDArray[np.float32]], NDArray[Any]]:
    if kind == "Q8_0":
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        return lambda values: quantize(values, GGMLQuantizationType.Q8_0)
    return lambda values: to_storage(values, "F16" if kind == "F16" else "F32")
