"""What a model's `config.json` says of its layers, cut down to some of them.

Only what is known to be safe is cut. Where a layer's place decides what it computes, and the configuration cannot say
it layer by layer, a layer that moves would become another one: such a model is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlx_distill.errors import ModelError

#: Architectures (`model_type`) whose layers are what they are by their weights and by the keys below, and by nothing
#: else, in mlx-lm and in transformers.
ARCHITECTURES = frozenset(
    ("llama", "mistral", "qwen2", "qwen3", "gemma", "granite", "olmo2", "phi3", "seed_oss", "smollm3", "starcoder2")
)

#: Keys whose value is a list with an entry a layer.
_PER_LAYER = ("layer_types", "no_rope_layers")

#: Lists that are of something else, however long they are.
_OF_OTHERS = frozenset(("architectures", "bos_token_id", "eos_token_id", "pad_token_id"))

#: Keys that say by a rule which layers are of which kind.
_RULES = ("sliding_window_pattern", "full_attention_interval", "num_kv_shared_layers", "num_nextn_predict_layers")

#: The first layer with a sliding window, where Qwen's configuration has one and does not say.
_WINDOW_LAYERS = 28

_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


def cut_settings(config: Mapping[str, Any], kept: Sequence[int], folder: Path) -> dict[str, Any]:
    """The configuration of a model with some of its layers.

    Args:
        config: As mlx-lm's `load_model` gives it.
        kept: Layers, ascending.
        folder: For an error.

    Raises:
        ModelError: The architecture is not known, or the configuration cannot be cut; says why.
    """
    kind, count = config.get("model_type"), config.get("num_hidden_layers")
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"{folder}: layers are not taken out of an architecture such as {kind}, as it is not known that they do "
            "not depend on their place.",
            hint=f"These are known: {', '.join(sorted(ARCHITECTURES))}.",
        )
    if not isinstance(count, int) or any(at >= count for at in kept):
        raise _refusal(folder, f"num_hidden_layers = {count} is not the number of its layers")
    cut = {**config, "num_hidden_layers": len(kept)}
    for key, value in config.items():
        if isinstance(value, list) and key in _PER_LAYER and value:
            if len(value) < count:
                raise _refusal(folder, f"{key} has {len(value)} entries for {count} layers")
            cut[key] = [value[at] for at in kept]
        elif isinstance(value, list) and len(value) == count > 1 and key not in _OF_OTHERS:
            raise _refusal(folder, f"{key} may hold an entry for each layer, and is not known")
    if rule := next((key for key in _RULES if config.get(key)), None):
        raise _refusal(folder, f"{rule} = {config[rule]!r} gives layers their kind by their place")
    if kind == "smollm3" and not config.get("no_rope_layers"):
        raise _refusal(folder, "without no_rope_layers, a layer's place decides whether it turns positions")
    if "max_window_layers" in config or config.get("use_sliding_window"):
        # Layers below it see everything: as many of them as are kept.
        boundary = config.get("max_window_layers")
        cut["max_window_layers"] = sum(at < (_WINDOW_LAYERS if boundary is None else boundary) for at in kept)
    return _renumber_quantization(cut, kept, folder)


def _renumber_quantization(cut: dict[str, Any], kept: Sequence[int], folder: Path) -> dict[str, Any]:
    """Matrices that are quantized in a way of their own are named by their layer."""
    stated = cut.get("quantization")
    if stated is None:
        if (other := cut.get("quantization_config")) is not None:
            method = other.get("quant_method") if isinstance(other, dict) else other
            raise _refusal(folder, f"its weights are quantized as {method}, which is not written back as it was")
        return cut
    numbers = {str(old): new for new, old in enumerate(kept)}
    renumbered = {}
    for key, value in stated.items():
        match = _LAYER.fullmatch(key)
        if match is None:
            renumbered[key] = value
        elif match[1] in numbers:
            renumbered[f"model.layers.{numbers[match[1]]}.{match[2]}"] = value
    return {**cut, "quantization": renumbered, "quantization_config": renumbered}


def _refusal(folder: Path, reason: str) -> ModelError:
    return ModelError(
        f"{folder / 'config.json'}: layers cannot be taken out of this model: {reason}.",
        hint="Take another model of the same family, or another quantization of this one.",
    )
