"""Converts a GGUF file into a Hugging Face folder that mlx-lm and transformers load, once, into the cache.

Reads: a `.gguf` file of the architecture llama or qwen2.
Writes: `CACHE/gguf/HASH-FORMAT/model/`: config.json, generation_config.json, model.safetensors, tokenizer.json,
tokenizer_config.json, README.md (where it came from, and its licence).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from mlx_distill import layout
from mlx_distill.errors import FolderError, InUseError, ResourceError
from mlx_distill.models.gguf_config import generation_config, model_config
from mlx_distill.models.gguf_reader import GgufFile, read_gguf
from mlx_distill.models.gguf_tokenizer import save_tokenizer
from mlx_distill.models.gguf_weights import convert_tensors, plan_tensors, require_architecture
from mlx_distill.models.safetensors import write_safetensors
from mlx_distill.progress import SILENT, Progress

#: Part of the cache's key: raised with every change of what conversion writes.
CONVERTER_FORMAT = 1

_WAIT_SECONDS = 0.5


def cached_folder(sha256: str) -> Path:
    """Where the conversion of the GGUF with this hash lies, or would lie. It is whole or not there."""
    return layout.models_cache() / "gguf" / f"{sha256[:32]}-{CONVERTER_FORMAT}" / "model"


def convert_gguf(path: Path, *, sha256: str | None = None, progress: Progress = SILENT) -> Path:
    """The converted model of a GGUF file; made on the first call, found on later ones.

    Two processes that convert the same file take turns; the second finds what the first made.

    Args:
        sha256: The file's hash, where it is known already.

    Raises:
        InputError: It is not a whole GGUF file.
        ModelError: Its architecture, a tensor's type or its tokenizer is not one that can be converted.
        ResourceError: The cache's disk is too full.
    """
    source = read_gguf(path)
    require_architecture(source)
    folder = cached_folder(sha256 or layout.file_sha256(path))
    told = False
    while not folder.is_dir():
        try:
            with layout.lock(folder.parent):
                if not folder.is_dir():
                    _convert(source, folder, progress)
        except InUseError:
            if not told:
                progress.say(f"Another process converts {path.name}; waiting for it.")
                told = True
            time.sleep(_WAIT_SECONDS)
        except FolderError as error:
            raise ResourceError(
                f"The cache cannot be written: {error.message}", hint="Set MLX_DISTILL_CACHE to a folder that can."
            ) from None
    return folder


def _convert(source: GgufFile, folder: Path, progress: Progress) -> None:
    plan = plan_tensors(source)
    needed = sum(spec.bytes for _, spec in plan)
    layout.require_disk(folder, needed + 50_000_000, what=f"Converting {source.path.name}")
    with (
        layout.atomic_folder(folder) as temporary,
        progress.task(f"Converting {source.path.name}", len(plan), unit="tensors") as bar,
    ):
        save_tokenizer(source, temporary)
        _write_json(temporary / "config.json", model_config(source))
        _write_json(temporary / "generation_config.json", generation_config(source))
        (temporary / "README.md").write_text(_model_card(source), encoding="utf-8")

        def converted() -> Any:
            for array in convert_tensors(source, plan):
                yield array
                bar.advance()

        write_safetensors(temporary / "model.safetensors", [spec for _, spec in plan], converted())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _model_card(source: GgufFile) -> str:
    licence = source.get("general.license", str, "")
    head = f"---\nlicense: {licence}\n---\n\n" if licence else ""
    name = source.get("general.name", str, source.path.stem)
    kinds = ", ".join(sorted({tensor.type for tensor in source.tensors.values()}))
    return f"{head}# {name}\n\nConverted by mlx-distill from `{source.path.name}` ({source.architecture}; {kinds}).\n"
