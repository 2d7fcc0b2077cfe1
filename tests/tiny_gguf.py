"""Tiny GGUF files, written from the tiny models of `tests.tiny` with llama.cpp's own writer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Ggml
from gguf.quants import quantize
from numpy.typing import NDArray
from safetensors.numpy import load_file

_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

_WHOLE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def permute(weights: NDArray[Any], heads: int) -> NDArray[Any]:
    """What llama.cpp does to q and k of a llama model on conversion: halves of each head become pairs."""
    out = weights.shape[0]
    return weights.reshape(heads, 2, out // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


def gguf_name(name: str) -> str:
    """llama.cpp's name of a Hugging Face tensor."""
    stem, _, ending = name.rpartition(".")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{ending}"
    _, _, layer, rest = stem.split(".", 3)
    return f"blk.{layer}.{_BLOCK[rest]}.{ending}"


def write_gguf(
    model: Path,
    path: Path,
    *,
    kind: Ggml = Ggml.F32,
    architecture: str | None = None,
    pre: str = "qwen2",
    token_types: Mapping[str, int] | None = None,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    leave_out: tuple[str, ...] = (),
) -> Path:
    """Write the tiny model of a folder as a GGUF.

    Args:
        kind: Type of the matrices; norms and biases are float32, as llama.cpp has them.
        architecture: What the file claims to be; the model's own without it.
        token_types: Types of tokens that are neither normal nor special.
        extra: Adds metadata or tensors.
        leave_out: llama.cpp's names of tensors that the file shall lack.
    """
    config = json.loads((model / "config.json").read_text())
    tokenizer_config = json.loads((model / "tokenizer_config.json").read_text())
    writer = gguf.GGUFWriter(path, architecture or config["model_type"])
    writer.add_name("Tiny")
    writer.add_license("mit")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_tokenizer(writer, model, pre, token_types or {})
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    if "chat_template" in tokenizer_config:
        writer.add_chat_template(tokenizer_config["chat_template"])
    extra(writer)
    for name, weights in load_file(model / "model.safetensors").items():
        values = _as_llama_cpp_has_it(name, weights, config)
        if gguf_name(name) not in leave_out:
            _add_tensor(writer, gguf_name(name), values, kind if values.ndim > 1 else Ggml.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _as_llama_cpp_has_it(name: str, weights: NDArray[Any], config: Mapping[str, Any]) -> NDArray[Any]:
    if config["model_type"] == "llama" and ".q_proj" in name:
        return permute(weights, config["num_attention_heads"])
    if config["model_type"] == "llama" and ".k_proj" in name:
        return permute(weights, config["num_key_value_heads"])
    return weights


def _add_tensor(writer: gguf.GGUFWriter, name: str, values: NDArray[np.float32], kind: Ggml) -> None:
    if kind == Ggml.F32:
        writer.add_tensor(name, values)
    elif kind == Ggml.F16:
        writer.add_tensor(name, values.astype(np.float16))
    else:
        writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)


def _add_tokenizer(writer: gguf.GGUFWriter, model: Path, pre: str, token_types: Mapping[str, int]) -> None:
    whole = json.loads((model / "tokenizer.json").read_text())
    special = {token["content"]: token["id"] for token in whole["added_tokens"]}
    ids = {**whole["model"]["vocab"], **special}
    tokens = sorted(ids, key=lambda token: ids[token])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([token_types.get(token, 3 if token in special else 1) for token in tokens])
    writer.add_token_merges(
        [merge if isinstance(merge, str) else " ".join(merge) for merge in whole["model"]["merges"]]
    )
