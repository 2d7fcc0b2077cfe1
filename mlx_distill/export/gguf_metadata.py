"""A model's `config.json` as a GGUF's metadata, for the architectures llama and qwen2.

What llama.cpp would compute otherwise than the model was trained is refused, not left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mlx_distill.errors import ModelError
from mlx_distill.models.folder import read_config, rotary_settings
from mlx_distill.models.gguf_config import llama3_factors
from mlx_distill.models.gguf_weights import ARCHITECTURES

if TYPE_CHECKING:
    from gguf import GGUFWriter

_OTHER_WAY = "Export it with --to hf or mlx instead."

#: Sizes that a config must state.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "vocab_size",
)

#: Low and high frequency factor and context that `llama3_factors` computes with: all of Llama 3's models have them.
_LLAMA3 = (1.0, 4.0, 8192)

#: Of yarn, what GGUF has no word for, with the value that llama.cpp takes.
_YARN_DEFAULTS: Mapping[str, Any] = {
    "beta_fast": 32,
    "beta_slow": 1,
    "attention_factor": None,
    "mscale": None,
    "mscale_all_dim": None,
    "truncate": True,
}


def exportable_config(model: Path) -> dict[str, Any]:
    """A model's `config.json`, with its rotary settings under mlx-lm's names.

    Raises:
        ModelError: The architecture is another, or one of its settings cannot be said in a GGUF.
    """
    config = {**read_config(model), **rotary_settings(model)}
    kind, classes = str(config.get("model_type")), config.get("architectures")
    if kind not in ARCHITECTURES or (classes and ARCHITECTURES[kind] not in classes):
        named = f"'{kind}'" + (f" ({', '.join(map(str, classes))})" if isinstance(classes, list) else "")
        raise ModelError(
            f"{model} has the architecture {named}; as GGUF, {' and '.join(ARCHITECTURES)} can be written.",
            hint=_OTHER_WAY,
        )
    for key in _SIZES:
        if not isinstance(config.get(key), int) or isinstance(config[key], bool) or config[key] < 1:
            raise ModelError(f"{model / 'config.json'}: {key} is {config.get(key)!r}, which is no size.")
    if reason := _unsayable(config):
        raise ModelError(f"{model}: {reason}, which llama.cpp does not compute for {kind}.", hint=_OTHER_WAY)
    return config


def _unsayable(config: Mapping[str, Any]) -> str | None:
    if "quantization" in config or "quantization_config" in config:
        return "its weights are quantized"
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        return f"its activation is {config['hidden_act']}"
    if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
        return "it attends within a sliding window"
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        return "it turns only a part of each head"
    if config["model_type"] == "qwen2" and head_size(config) * config["num_attention_heads"] != config["hidden_size"]:
        return "its heads are not as wide as the model"
    return None


def head_size(config: Mapping[str, Any]) -> int:
    """Width of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def is_tied(config: Mapping[str, Any], *, has_head: bool) -> bool:
    """Whether the embedding is the output matrix too. Where the config does not say, it is if there is no other."""
    return bool(config.get("tie_word_embeddings", not has_head))


def add_sizes(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    """Write what `config.json` says of the architecture.

    Raises:
        ModelError: How it stretches its rotary embedding cannot be said in a GGUF.
    """
    heads = config["num_attention_heads"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_rope_dimension_count(head_size(config))
    writer.add_rope_freq_base(float(config.get("rope_theta", 10000.0)))
    # What transformers takes where the file does not say.
    writer.add_layer_norm_rms_eps(float(config.get("rms_norm_eps", 1e-6)))
    _add_scaling(writer, config)


def _scaling(config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    stated = config.get("rope_scaling") or {}
    kind = stated.get("rope_type") or stated.get("type") or "default"
    return kind, stated


def _add_scaling(writer: GGUFWriter, config: Mapping[str, Any]) -> None:
    from gguf import RopeScalingType

    kind, stated = _scaling(config)
    if kind in ("default", "llama3"):
        return
    odd = [key for key, usual in _YARN_DEFAULTS.items() if stated.get(key, usual) != usual]
    if kind not in ("linear", "yarn") or odd or not isinstance(stated.get("factor"), (int, float)):
        raise ModelError(
            f"The model stretches its rotary embedding by {dict(stated)}, which cannot be said in a GGUF.",
            hint=_OTHER_WAY,
        )
    writer.add_rope_scaling_factor(float(stated["factor"]))
    writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
    if kind == "yarn":
        original = stated.get("original_max_position_embeddings") or config["max_position_embeddings"]
        writer.add_rope_scaling_orig_ctx_len(int(original))


def rotary_factors(config: Mapping[str, Any]) -> NDArray[np.float32] | None:
    """The tensor `rope_freqs.weight`, (head_size / 2,), by which Llama 3 stretches its rotary embedding; or None.

    Raises:
        ModelError: It is stretched otherwise than Llama 3 is.
    """
    kind, stated = _scaling(config)
    if kind != "llama3":
        return None
    keys = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    if tuple(stated.get(key) for key in keys) != _LLAMA3 or not isinstance(stated.get("factor"), (int, float)):
        raise ModelError(
            f"The model stretches its rotary embedding by {dict(stated)}, unlike Llama 3.", hint=_OTHER_WAY
        )
    return llama3_factors(float(config.get("rope_theta", 10000.0)), head_size(config), float(stated["factor"]))
