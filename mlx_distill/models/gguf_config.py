"""A GGUF's metadata as `config.json` and `generation_config.json`.

Rotary settings are written under the names that mlx-lm reads (`rope_theta`, `rope_scaling`); transformers reads
them too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_distill.errors import ModelError
from mlx_distill.models.gguf_reader import GgufFile
from mlx_distill.models.gguf_vocabulary import read_vocabulary
from mlx_distill.models.gguf_weights import (
    ARCHITECTURES,
    ROPE_FREQUENCIES,
    dimensions,
    require_architecture,
    storage_type,
)

_TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

#: What Llama 3.1 and 3.2 were trained with; GGUF keeps only the frequencies that follow from them.
_LLAMA3_LOW, _LLAMA3_HIGH, _LLAMA3_CONTEXT = 1.0, 4.0, 8192


def model_config(source: GgufFile) -> dict[str, Any]:
    """The `config.json` of the converted model.

    Raises:
        ModelError: The architecture, or how it stretches the rotary embedding, is not one that can be converted.
    """
    architecture = require_architecture(source)
    sizes = dimensions(source)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "hidden_size": sizes.width,
        "intermediate_size": sizes.feed_forward,
        "num_hidden_layers": sizes.blocks,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads_kv,
        "max_position_embeddings": source.hyper("context_length", int),
        "rms_norm_eps": _round_float32(source.hyper("attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _round_float32(source.hyper("rope.freq_base", float, 10000.0)),
        "rope_scaling": _rope_scaling(source, sizes.head_size),
        "vocab_size": sizes.vocabulary,
        "tie_word_embeddings": "output.weight" not in source.tensors,
        "torch_dtype": _TORCH_NAMES[storage_type(source)],
        "use_cache": True,
        **_special_ids(source),
    }
    if architecture == "llama":
        config["head_dim"] = sizes.head_size
        config["attention_bias"] = "blk.0.attn_q.bias" in source.tensors
        config["mlp_bias"] = "blk.0.ffn_up.bias" in source.tensors
    elif sizes.head_size * sizes.heads != sizes.width:
        raise ModelError(f"{source.path}: {sizes.heads} heads of {sizes.head_size} do not make qwen2's {sizes.width}.")
    return config


def generation_config(source: GgufFile) -> dict[str, Any]:
    """The `generation_config.json`: which tokens end an answer."""
    ids = _special_ids(source)
    turn_end = read_vocabulary(source).special.get("eot")
    if turn_end is not None and ids.get("eos_token_id") not in (None, turn_end):
        return {"_from_model_config": True, **ids, "eos_token_id": [ids["eos_token_id"], turn_end]}
    return {"_from_model_config": True, **ids}


def _special_ids(source: GgufFile) -> dict[str, int]:
    special = read_vocabulary(source).special
    roles = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    return {key: special[role] for key, role in roles.items() if role in special}


def _round_float32(value: float) -> float:
    """The shortest decimal that is this float32: 1e-05, where a float64 would read 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(source: GgufFile, head_dim: int) -> dict[str, Any] | None:
    if ROPE_FREQUENCIES in source.tensors:
        return _llama3_scaling(source, head_dim)
    kind = source.hyper("rope.scaling.type", str, "linear")
    factor = source.hyper("rope.scaling.factor", float, source.hyper("rope.scale_linear", float, 1.0))
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind == "linear":
        return {"type": "linear", "rope_type": "linear", "factor": factor}
    if kind == "yarn":
        original = source.hyper("rope.scaling.original_context_length", int)
        return {
            "type": "yarn",
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
        }
    raise ModelError(
        f"{source.path} stretches its rotary embedding by '{kind}'; linear and yarn can be read.",
        hint="Give the model's Hugging Face folder or its Hub id instead.",
    )


def _llama3_scaling(source: GgufFile, head_dim: int) -> dict[str, Any]:
    """Llama 3's scaling, recovered from the factors it leads to, and checked against them."""
    stored = source.tensors[ROPE_FREQUENCIES].values()
    base = source.hyper("rope.freq_base", float, 10000.0)
    factor = float(stored.max())
    expected = llama3_factors(base, head_dim, factor)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
        raise ModelError(
            f"{source.path} has rotary frequencies that are not Llama 3's.",
            hint="Give the model's Hugging Face folder or its Hub id instead.",
        )
    return {
        "type": "llama3",
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": _LLAMA3_LOW,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }


def llama3_factors(base: float, head_dim: int, factor: float) -> NDArray[np.float32]:
    """By what Llama 3 divides each rotary frequency: 1 for the fast ones, `factor` for the slow, a ramp between.

    Returns:
        (head_dim / 2,)
    """
    frequencies = base ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * math.pi / frequencies
    ramp = (_LLAMA3_CONTEXT / wavelengths - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    share = np.clip(ramp, 0.0, 1.0)
    factors: NDArray[np.float32] = (1 / ((1 - share) / factor + share)).astype(np.float32)
    return factors
