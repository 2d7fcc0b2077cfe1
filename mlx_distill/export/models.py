"""A whole model's files, copied or written anew for another tool."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from mlx_distill.errors import ModelError
from mlx_distill.models.folder import companions, read_config

_WHOLE = ("model*.safetensors", "model.safetensors.index.json", "config.json")


def copy_model(model: Path, out: Path) -> None:
    """Copy a whole model as it is.

    Raises:
        ModelError: One of its files is a link that leads out of its folder.
    """
    copy_companions(model, out)
    for file in _confined(model, (file for name in _WHOLE for file in sorted(model.glob(name)))):
        shutil.copyfile(file, out / file.name)


def copy_companions(model: Path, out: Path) -> None:
    """Copy tokenizer, template and licence.

    Raises:
        ModelError: One of them is a link that leads out of its folder.
    """
    for file in _confined(model, companions(model)):
        shutil.copyfile(file, out / file.name)


def is_quantized(model: Path) -> bool:
    """Whether some of its matrices are quantized, as its `config.json` says.

    Raises:
        ModelError: It cannot be read.
    """
    return bool(read_config(model).get("quantization"))


def weight_bytes(model: Path) -> int:
    """Size of its weights on disk."""
    return sum(file.stat().st_size for file in model.glob("model*.safetensors"))


def _confined(folder: Path, files: Iterable[Path]) -> Iterator[Path]:
    whole = folder.resolve()
    for file in files:
        if not file.resolve().is_relative_to(whole):
            # What it leads to, such as a key, would be shared with the model.
            raise ModelError(
                f"{file} is a link that leads out of its folder, to {file.resolve()}.",
                hint="Put the file itself there.",
            )
        if file.is_file():
            yield file
