"""From llama.cpp's tensors and metadata to Hugging Face's, for the architectures llama and qwen2.

llama.cpp stores the rows of q and k of `llama` models pairwise interleaved, since its rotary embedding turns
neighbours; Hugging Face's turns halves. That permutation is undone here. `qwen2` has none.

Does not know mixtures of experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_distill.errors import ModelError
from mlx_distill.models.gguf_reader import GgufFile, GgufTensor
from mlx_distill.models.safetensors import StorageType, TensorSpec, to_storage

#: GGUF architecture → the class that transformers loads.
ARCHITECTURES: Mapping[str, str] = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}

#: Tensors that hold no weights: `rope_freqs` says by its values how Llama 3 stretches the rotary embedding.
ROPE_FREQUENCIES = "rope_freqs.weight"


def require_architecture(source: GgufFile) -> str:
    """The file's architecture.

    Raises:
        ModelError: It is not one that can be converted.
    """
    name = source.architecture
    if name not in ARCHITECTURES:
        raise ModelError(
            f"{source.path} has the architecture '{name}'; from a GGUF, {' and '.join(ARCHITECTURES)} can be read.",
            hint="Give the model's Hugging Face folder or its Hub id instead.",
        )
    return name


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a model, by the names of llama.cpp's metadata."""

    width: int
    feed_forward: int
    blocks: int
    heads: int
    heads_kv: int
    head_size: int
    vocabulary: int

    def shape(self, stem: str) -> tuple[int, ...]:
        """Of the weight that GGUF calls `stem` ("attn_q", "token_embd", …)."""
        queries, keys = self.heads * self.head_size, self.heads_kv * self.head_size
        shapes: dict[str, tuple[int, ...]] = {
            "token_embd": (self.vocabulary, self.width),
            "output": (self.vocabulary, self.width),
            "attn_q": (queries, self.width),
            "attn_k": (keys, self.width),
            "attn_v": (keys, self.width),
            "attn_output": (self.width, queries),
            "ffn_gate": (self.feed_forward, self.width),
            "ffn_up": (self.feed_forward, self.width),
            "ffn_down": (self.width, self.feed_forward),
        }
        return shapes.get(stem, (self.width,))


def dimensions(source: GgufFile) -> Dimensions:
    """Read a model's sizes from the metadata.

    Raises:
        ModelError: One is missing, or is not a size that a model of this architecture can have.
    """
    width = source.hyper("embedding_length", int)
    heads = source.hyper("attention.head_count", int)
    embedding = source.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError(f"{source.path} lacks a whole tensor token_embd.weight.", hint="Download it again.")
    found = Dimensions(
        width=width,
        feed_forward=source.hyper("feed_forward_length", int),
        blocks=source.hyper("block_count", int),
        heads=heads,
        heads_kv=source.hyper("attention.head_count_kv", int, heads),
        head_size=source.hyper("attention.key_length", int, width // heads if heads > 0 else 0),
        vocabulary=embedding.shape[0],
    )
    if min(vars(found).values()) < 1 or found.blocks > len(source.tensors) or found.head_size % 2:
        raise ModelError(f"{source.path} states sizes that no model can have: {vars(found)}.")
    return found


def storage_type(source: GgufFile) -> StorageType:
    """The one type in which all weights of a converted model are stored.

    float32, float16 and bfloat16 matrices keep their type. A quantised source is stored in float16: each of its
    values is a small integer times a float16 scale, so the 11 bits of float16 lose little of it where bfloat16's 8
    would add an error of their own. Norms and biases, which GGUF always has in float32, follow the matrices, since
    a single float32 tensor would draw all activations to float32.
    """
    kinds = {tensor.type for tensor in source.tensors.values() if len(tensor.shape) > 1}
    for name, kind in (("F32", "F32"), ("F16", "F16"), ("BF16", "BF16")):
        if kinds == {name}:
            return kind  # type: ignore[return-value]
    return "F16"


def plan_tensors(source: GgufFile) -> list[tuple[GgufTensor, TensorSpec]]:
    """Every tensor of the file with what it becomes.

    Raises:
        ModelError: One has a name or a shape that the architecture does not have, or one is missing.
    """
    kind = storage_type(source)
    _require_complete(source, dimensions(source))
    return [
        (tensor, TensorSpec(_hugging_face_name(source, tensor.name), tensor.shape, kind))
        for tensor in source.tensors.values()
        if tensor.name != ROPE_FREQUENCIES
    ]


def convert_tensors(source: GgufFile, plan: list[tuple[GgufTensor, TensorSpec]]) -> Iterator[NDArray[Any]]:
    """The values of the planned tensors, in that order.

    Raises:
        ModelError: A tensor's type cannot be dequantised, or a value does not fit the storage type.
    """
    sizes = dimensions(source)
    for tensor, spec in plan:
        values = tensor.values()
        if source.architecture == "llama":
            if ".attn_q." in tensor.name:
                values = unpermute(values, sizes.heads)
            elif ".attn_k." in tensor.name:
                values = unpermute(values, sizes.heads_kv)
        try:
            yield to_storage(values, spec.type)
        except OverflowError as error:
            raise ModelError(
                f"tensor {tensor.name} of {source.path}: {error}.", hint="Use a GGUF with BF16 or F32 weights."
            ) from None


def unpermute(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Undo llama.cpp's reordering of the rows of a q or k projection.

    Within a head of size D, its row 2i + j is Hugging Face's row j·D/2 + i (convert_hf_to_gguf.py, `permute`).

    Args:
        values: (heads · D, …): a weight or a bias.
    """
    rows = values.shape[0]
    return values.reshape(heads, rows // heads // 2, 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def _hugging_face_name(source: GgufFile, name: str) -> str:
    stem, _, ending = name.rpartition(".")
    if ending in ("weight", "bias"):
        if stem in _WHOLE:
            return f"{_WHOLE[stem]}.{ending}"
        if (match := re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)) and match[2] in _BLOCK:
            return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.{ending}"
    raise ModelError(
        f"{source.path} has the tensor '{name}', which a plain {source.architecture} model does not have.",
        hint="Give the model's Hugging Face folder or its Hub id instead.",
    )


def _require_complete(source: GgufFile, sizes: Dimensions) -> None:
    wanted = ["token_embd.weight", "output_norm.weight"]
    for block in range(sizes.blocks):
        wanted += [f"blk.{block}.{stem}.weight" for stem in _BLOCK]
        if source.architecture == "qwen2":
            wanted += [f"blk.{block}.attn_{part}.bias" for part in "qkv"]
    missing = [name for name in wanted if name not in source.tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{source.path} lacks the tensor {missing[0]}{more}.", hint="Download it again.")
    for tensor in source.tensors.values():
        stem, _, ending = tensor.name.rpartition(".")
        shape = sizes.shape(stem.rpartition(".")[2])
        expected = shape[:1] if ending == "bias" else shape
        if tensor.name != ROPE_FREQUENCIES and tensor.shape != expected:
            raise ModelError(
                f"{source.path}: tensor {tensor.name} is {tensor.shape}, where its metadata makes it {expected}."
            )
