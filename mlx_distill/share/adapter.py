"""What an adapter's two files must be before they are sent, or after they came: read without loading a tensor."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mlx_distill import layout
from mlx_distill.errors import InputError

#: No adapter has more; mlx-lm makes room for what this says before it looks at the file.
_MOST = 65_536

_AGAIN = "Copy or download it again, or train again:  mlx-distill train --help"


class _LoraParameters(BaseModel):
    model_config = ConfigDict(extra="allow")

    rank: int = Field(gt=0, le=_MOST)
    scale: float = Field(allow_inf_nan=False)
    dropout: float = Field(0.0, ge=0, lt=1)
    keys: list[Annotated[str, Field(max_length=200)]] | None = Field(None, max_length=1000)


class _AdapterConfig(BaseModel):
    model_config = ConfigDict(extra="allow")

    fine_tune_type: Literal["lora", "dora"] = "lora"
    #: -1 is mlx-lm's word for all.
    num_layers: int = Field(ge=-1, le=_MOST)
    lora_parameters: _LoraParameters


def read_adapter_config(path: Path) -> dict[str, Any]:
    """mlx-lm's `adapter_config.json`.

    Raises:
        InputError: It is missing, or does not describe a LoRA or DoRA adapter.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such file.", path=path, hint=_AGAIN) from None
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"cannot be read ({error}).", path=path, hint=_AGAIN) from None
    try:
        _AdapterConfig.model_validate(settings)
    except ValidationError as error:
        raise InputError(
            f"describes no adapter of mlx-lm's: {layout.explain(error)}.", path=path, hint=_AGAIN
        ) from None
    assert isinstance(settings, dict)
    return settings


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a safetensors file.

    Raises:
        InputError: It is missing, damaged, or no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise InputError("no such file.", path=path, hint=_AGAIN) from None
    except (SafetensorError, OSError) as error:
        kind = " (it is a pickle or an archive, which can run code)" if _is_pickle(path) else ""
        raise InputError(f"is not a whole safetensors file{kind}: {error}.", path=path, hint=_AGAIN) from None


def check_adapter(path: Path, settings: dict[str, Any]) -> int:
    """Refuse a file that is not the whole adapter that its configuration describes.

    Args:
        settings: Its configuration, as `read_adapter_config` gives it.

    Returns:
        How many parameters it has.

    Raises:
        InputError: It is missing, damaged, no safetensors file, or of another rank.
    """
    shapes = tensor_shapes(path)
    rank = settings["lora_parameters"]["rank"]
    factors = {name: shape for name, shape in shapes.items() if "lora_a" in name.split(".")}
    if not factors:
        raise InputError("holds no LoRA factors (lora_a).", path=path, hint=_AGAIN)
    for name, shape in factors.items():
        # (in, rank); of experts (experts, rank, in).
        found = shape[1] if len(shape) in (2, 3) else None
        if found != rank:
            raise InputError(f"{name} is {shape}, and adapter_config.json says rank {rank}.", path=path, hint=_AGAIN)
    return sum(math.prod(shape) for shape in shapes.values())


def _is_pickle(path: Path) -> bool:
    """Whether a file begins as a pickle or as the archive that torch puts one in."""
    try:
        with path.open("rb") as file:
            return file.read(4).startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04"))
    except OSError:
        return False
