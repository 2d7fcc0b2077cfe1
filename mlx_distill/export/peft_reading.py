"""Reads a folder that PEFT wrote, and refuses what mlx-lm does not compute."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from mlx_distill import layout
from mlx_distill.errors import InputError
from mlx_distill.export.peft import CONFIG, LEAVES, PREFIX, WEIGHTS, Adapter, Arrays, check_shapes
from mlx_distill.export.tensors import read_tensors, require_finite

#: Settings that change what is computed, beyond LoRA, rsLoRA and DoRA: each must be off.
_UNKNOWN = (
    *("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "lora_bias"),
    *("fan_in_fan_out", "use_qalora", "use_bdlora", "kasa_config", "arrow_config", "alora_invocation_tokens"),
    *("monteclora_config", "megatron_config"),
)

#: Ways to start that leave the base's weights as they are. Others, such as PiSSA, change them: the adapter is then for
#: a model that is nowhere.
_STARTS = ("gaussian", "eva", "orthogonal")

#: An older PEFT kept the name of the adapter, or of the vector's layer, in the names.
_NAME = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+?)\."
    r"(?P<leaf>lora_A\.(?:default\.)?weight|lora_B\.(?:default\.)?weight|lora_magnitude_vector(?:\.weight)?)"
)

_PARAMETERS = {name: (leaf, turned) for leaf, (name, turned) in LEAVES.items()}


class PeftConfig(BaseModel):
    """Of PEFT's `adapter_config.json`, what is needed of it. The rest is kept beside it."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, strict=True)

    peft_type: str
    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int = Field(gt=0)
    lora_alpha: float = Field(gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None


def read_config(folder: Path) -> PeftConfig:
    """PEFT's configuration of an adapter.

    Raises:
        InputError: It is missing or damaged, or is one of what mlx-lm does not compute.
    """
    if not folder.is_dir():
        raise InputError("no such folder.", path=folder)
    path = folder / CONFIG
    found = layout.read_record(path, PeftConfig, hint="Give the folder that PEFT's save_pretrained wrote.")
    if found.peft_type != "LORA":
        raise InputError(f"it is of type {found.peft_type}; mlx-lm computes LORA alone.", path=path)
    # Some of them are lists or tables that may be there and empty.
    own = [name for name in _UNKNOWN if (found.model_extra or {}).get(name)]
    own += ["rank_pattern"] * any(rank != found.r for rank in (found.rank_pattern or {}).values())
    own += ["alpha_pattern"] * any(alpha != found.lora_alpha for alpha in (found.alpha_pattern or {}).values())
    own += ["bias"] * (found.bias != "none")
    if own:
        raise InputError(f"it sets {', '.join(own)}, which mlx-lm does not compute.", path=path)
    start = found.init_lora_weights
    if isinstance(start, str) and start not in _STARTS:
        raise InputError(
            f"it was started with {start}, which changes the weights of the base model itself.",
            path=path,
            hint="Let PEFT convert it to plain LoRA:  save_pretrained(…, path_initial_model_for_weight_conversion=…)",
        )
    return found


def read_modules(folder: Path, described: PeftConfig) -> tuple[dict[str, Arrays], dict[str, str]]:
    """The parameters of each adapted matrix as mlx-lm has them, and the metadata of the file.

    Raises:
        InputError: The file is missing, damaged or a pickle, or holds what mlx-lm has no name for.
        ModelError: Its tensors do not fit each other, or the configuration.
    """
    path = folder / WEIGHTS
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    if not path.exists() and pickles:
        raise InputError(
            f"its weights are only there as a pickle ({pickles[0]}), which can run any code.",
            path=folder,
            hint="Save it again with a newer PEFT, which writes adapter_model.safetensors.",
        )
    tensors, metadata = read_tensors(path)
    require_finite(tensors, path)
    modules: dict[str, Arrays] = {}
    for name, values in tensors.items():
        match = _NAME.fullmatch(name)
        if match is None:
            raise InputError(f"it holds {name}, which mlx-lm has no name for.", path=path)
        stem, _, _ = match["leaf"].partition(".")
        leaf, turned = _PARAMETERS[stem if stem == "lora_magnitude_vector" else f"{stem}.weight"]
        leaves = modules.setdefault(match["module"], {})
        if leaf in leaves:
            raise InputError(f"it holds {stem} of {match['module']} twice.", path=path)
        leaves[leaf] = np.ascontiguousarray(values.T if turned else values)
    check_shapes(Adapter(modules, described.use_dora, described.r, 1.0, 0.0), path)
    return modules, metadata
