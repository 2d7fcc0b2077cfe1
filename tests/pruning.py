"""What tests of pruning share: models of several architectures, and models that lose layers in memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load_model, save_model

from mlx_distill.config import PruneConfig
from mlx_distill.models.folder import rotary_settings
from mlx_distill.prune import PrunedRecord, prune
from tests.tiny import make_tiny_model

#: What the architectures have beside the configuration of a tiny model. Their activation is the one that mlx-lm has
#: built in.
OWN_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": False},
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False, "max_window_layers": 4, "layer_types": ["full_attention"] * 4},
    "qwen3": {"head_dim": 16, "attention_bias": False},
    "gemma": {"head_dim": 16, "hidden_act": "gelu_python"},
    "granite": {
        "logits_scaling": 2.0,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "olmo2": {"attention_bias": False, "tie_word_embeddings": False},
    "phi3": {"tie_word_embeddings": False, "original_max_position_embeddings": 2048},
    "seed_oss": {
        "head_dim": 16,
        "attention_bias": True,
        "attention_out_bias": False,
        "mlp_bias": False,
        "rope_scaling": {"rope_type": "default"},
    },
    "smollm3": {"no_rope_layers": [1, 0, 1, 1], "use_sliding_window": False, "layer_types": ["full_attention"] * 4},
    "starcoder2": {"norm_epsilon": 1e-5, "hidden_act": "gelu", "tie_word_embeddings": True},
}


def make_model(folder: Path, kind: str, *, seed: int = 0, **settings: Any) -> Path:
    """A tiny random model of four layers, of an architecture that mlx-lm knows."""
    from mlx_lm.utils import _get_classes

    make_tiny_model(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = {"seed_oss": "SeedOss", "smollm3": "SmolLM3"}.get(kind, kind.capitalize())
    config |= {"model_type": kind, "architectures": [f"{architecture}ForCausalLM"], **OWN_SETTINGS[kind], **settings}
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    random = np.random.default_rng(seed)
    model.update(
        tree_unflatten(
            [
                # Norms near 1, or near 0 where 1 is added to them; matrices by their fan-in.
                (name, value + 0.1 * mx.array(random.standard_normal(value.shape).astype(np.float32)))
                if value.ndim == 1
                else (name, mx.array((random.standard_normal(value.shape) / value.shape[-1] ** 0.5).astype(np.float32)))
                for name, value in tree_flatten(model.parameters())
            ]
        )
    )
    save_model(folder, model)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def with_layers(folder: Path, kept: Sequence[int]) -> nn.Module:
    """The model in memory, in float32, with only these layers: the list is cut, and nothing else is touched."""
    model, _ = load_model(folder, model_config=rotary_settings(folder))
    model.set_dtype(mx.float32)
    model.model.layers = [model.model.layers[at] for at in kept]
    return model


def make_identity(folder: Path, layer: int) -> Path:
    """Let a layer of a model in one file do nothing: what it would add is zero."""
    path = folder / "model.safetensors"
    weights = weights_of(folder)
    for name in (f"model.layers.{layer}.self_attn.o_proj.weight", f"model.layers.{layer}.mlp.down_proj.weight"):
        weights[name] = mx.zeros_like(weights[name])
    mx.eval(weights)
    mx.save_safetensors(str(path), weights, metadata={"format": "pt"})
    return folder


def configure(folder: Path, **changes: Any) -> Path:
    """Change a model's `config.json`; None takes a key out."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}), encoding="utf-8")
    return folder


def pruned(model: Path, out: Path, data: Path | None, keep: int = 2, **options: Any) -> PrunedRecord:
    """Prune by the settings' defaults, but for these."""
    return prune(PruneConfig(model=str(model), keep_layers=keep, out=out, data=data, **options))


def weights_of(folder: Path) -> dict[str, mx.array]:
    """Of a model in one file."""
    return dict(mx.load(str(folder / "model.safetensors")))


def files_of(folder: Path) -> dict[str, bytes]:
    """All that a folder holds; nothing where there is none."""
    return {path.name: path.read_bytes() for path in folder.glob("*")}
