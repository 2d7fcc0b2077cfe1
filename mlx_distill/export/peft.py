"""PEFT's format of an adapter: its names, its scale, its configuration.

    OUT/adapter_config.json            rank, alpha, what is adapted, which base
    OUT/adapter_model.safetensors      base_model.model.MODULE.{lora_A.weight,lora_B.weight,lora_magnitude_vector}

PEFT keeps each factor the other way round, and an alpha of which it makes the scale: alpha / rank, or alpha / √rank
for rank-stabilised LoRA. Not every scale is such a quotient to the last bit: the file's metadata holds it as well.

Where mlx-lm and transformers name a module differently, the names here are mlx-lm's: that shows when PEFT loads them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from mlx_distill.errors import InputError, ModelError
from mlx_distill.export.tensors import read_tensors, require_finite
from mlx_distill.layout import RunFolder
from mlx_distill.models.bundled import BUNDLED
from mlx_distill.models.hub import HUB_ID
from mlx_distill.records import ModelRecord
from mlx_distill.run_records import RunRecord

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

#: What PEFT puts before the name of every module.
PREFIX = "base_model.model."

#: mlx-lm's name of a parameter → PEFT's, and whether PEFT has it the other way round.
LEAVES = {
    "lora_a": ("lora_A.weight", True),
    "lora_b": ("lora_B.weight", True),
    "m": ("lora_magnitude_vector", False),
}

#: Key of the metadata that holds the scale, as `float.hex` writes it.
SCALE_KEY = "mlx_lora_scale"

Arrays = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Adapter:
    """An adapter as mlx-lm has it.

    Attributes:
        modules: Name of each adapted matrix → its parameters: `lora_a` (in, rank), `lora_b` (rank, out), and for DoRA
            `m` (out,).
        scale: That the product of the factors is multiplied with.
    """

    modules: dict[str, Arrays]
    dora: bool
    rank: int
    scale: float
    dropout: float


def read_adapter(run: Path) -> Adapter:
    """The adapter of a run.

    Raises:
        InputError: A file is missing or damaged.
        ModelError: It adapts what PEFT has no name for, or its parameters do not fit each other.
    """
    files = RunFolder(run)
    settings = _settings(files.adapter_config)
    tensors, _ = read_tensors(files.adapter)
    require_finite(tensors, files.adapter)
    modules: dict[str, Arrays] = {}
    for name, values in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf not in LEAVES:
            raise ModelError(
                f"{files.adapter}: {name} is a part of a matrix that is several in one, which PEFT has no name for.",
                hint=f"Merge it instead:  mlx-distill fuse {run}",
            )
        modules.setdefault(module, {})[leaf] = values
    adapter = Adapter(modules, **settings)
    check_shapes(adapter, files.adapter)
    return adapter


def check_shapes(adapter: Adapter, path: Path) -> None:
    """Make sure that each matrix has all parameters, of the adapter's rank.

    Raises:
        ModelError: Says which does not.
    """
    if not adapter.modules:
        raise ModelError(f"{path}: this adapter adapts nothing.")
    wanted = {"lora_a": 2, "lora_b": 2, **({"m": 1} if adapter.dora else {})}
    for name, leaves in adapter.modules.items():
        if leaves.keys() != wanted.keys():
            raise ModelError(f"{path}: {name} has {_listed(leaves)}, where {_listed(wanted)} are needed.")
        if any(values.ndim != wanted[leaf] for leaf, values in leaves.items()):
            raise ModelError(f"{path}: {name} is no single matrix, which PEFT and mlx-lm adapt differently.")
        ranks = (leaves["lora_a"].shape[1], leaves["lora_b"].shape[0])
        if ranks != (adapter.rank, adapter.rank):
            raise ModelError(
                f"{path}: the factors of {name} have ranks {ranks[0]} and {ranks[1]}, and its configuration says "
                f"{adapter.rank}."
            )
        if adapter.dora and leaves["m"].shape[0] != leaves["lora_b"].shape[1]:
            raise ModelError(f"{path}: the magnitude of {name} does not fit its factors.")


def write_peft(adapter: Adapter, record: RunRecord, out: Path) -> None:
    """Write an adapter for PEFT.

    Args:
        record: Of the run that trained it: names the base, and says whether the scale is rank-stabilised.
        out: A folder.
    """
    tensors = {
        f"{PREFIX}{module}.{name}": np.ascontiguousarray(leaves[leaf].T if turned else leaves[leaf])
        for module, leaves in adapter.modules.items()
        for leaf, (name, turned) in LEAVES.items()
        if leaf in leaves
    }
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt", SCALE_KEY: adapter.scale.hex()})
    base, revision = base_name(record.model)
    rslora = record.config.get("rslora") is True
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": adapter.rank,
        "lora_alpha": alpha_of(adapter.scale, adapter.rank, rslora=rslora),
        "lora_dropout": adapter.dropout,
        "use_rslora": rslora,
        "use_dora": adapter.dora,
        # Whole names: the end of one, which PEFT takes too, could also be another's.
        "target_modules": sorted(adapter.modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    (out / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def base_name(model: ModelRecord) -> tuple[str, str | None]:
    """What others find the base model by, and its commit where it is on the Hub.

    Only a folder is named by its path, which is all that it has.
    """
    commit = model.revision if model.source == "hub" else None
    if model.spec in BUNDLED:
        return BUNDLED[model.spec].hub_id, commit
    if model.source == "hub" and (match := HUB_ID.fullmatch(model.spec)):
        return match["id"], commit
    return (model.spec if model.source == "folder" else Path(model.spec).name), None


def scale_of(alpha: float, rank: int, *, rslora: bool) -> float:
    """The factor of the update, by the very sum that PEFT does."""
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def alpha_of(scale: float, rank: int, *, rslora: bool) -> float:
    """The `lora_alpha` of which PEFT makes a scale: to the bit where there is one, else within two units of its last.

    A whole number where that serves as well, and then of type int.
    """
    near = scale * (math.sqrt(rank) if rslora else rank)
    tried = [float(round(near)), near, math.nextafter(near, math.inf), math.nextafter(near, 0.0)]
    alpha = min(tried, key=lambda one: abs(scale_of(one, rank, rslora=rslora) - scale))
    return int(alpha) if alpha.is_integer() and alpha < 2**53 else alpha


def exact_scale(stated: float, metadata: Mapping[str, str]) -> float:
    """The scale that an export of ours had, where the metadata still says so.

    Args:
        stated: By the configuration. Someone may have changed alpha since: then it holds, and the metadata does not.
    """
    try:
        kept = float.fromhex(metadata.get(SCALE_KEY, ""))
    except (ValueError, OverflowError):
        return stated
    return kept if abs(kept - stated) <= 4 * math.ulp(stated) else stated


def _settings(path: Path) -> dict[str, Any]:
    """Kind, rank, scale and dropout of mlx-lm's `adapter_config.json`."""
    hint = "Train again, or copy the run again."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        parameters = content["lora_parameters"]
        kind, rank, scale = content.get("fine_tune_type", "lora"), parameters["rank"], float(parameters["scale"])
        dropout = float(parameters.get("dropout", 0.0))
    except FileNotFoundError:
        raise InputError("no such file.", path=path, hint=hint) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}.", path=path) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"it is no configuration of an adapter ({error!r}).", path=path, hint=hint) from None
    if kind not in ("lora", "dora"):
        raise InputError(f"{kind!r} is no kind of adapter that PEFT has; it has lora and dora.", path=path)
    if type(rank) is not int or rank < 1 or not math.isfinite(scale) or not 0 <= dropout < 1:
        raise InputError(f"rank {rank}, scale {scale}, dropout {dropout} cannot be.", path=path, hint=hint)
    return {"dora": kind == "dora", "rank": rank, "scale": scale, "dropout": dropout}


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names))
