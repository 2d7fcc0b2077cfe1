"""Which files are published, under which names, and with what in them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mlx_distill import layout
from mlx_distill.config import ShareConfig
from mlx_distill.errors import InputError, ModelError
from mlx_distill.models.folder import check_folder
from mlx_distill.run_records import RunRecord
from mlx_distill.runs import read_fused
from mlx_distill.share.adapter import check_adapter, read_adapter_config
from mlx_distill.share.base import Base
from mlx_distill.share.cleaning import clean_fused, clean_json, clean_run, places_of, without_places
from mlx_distill.share.refusals import require_no_credentials

CARD = "README.md"
RECORD = "run.json"
#: Where the adapter lies beside a whole model, whose files the root then holds: loaders look for them there, and
#: transformers would take an `adapter_config.json` beside them for one of PEFT's.
ADAPTER_FOLDER = "adapter"
DATA_FOLDER = "data"
COMPARISON_FOLDER = "comparison"

CHARTS = ("training_curves", "model_scorecard", "prompt_comparison", "cost_scaling")

#: Of a fused model's folder. Never code, never another format's weights.
_MODEL_FILES = ("model*.safetensors", "*.json", "*.jinja", "vocab.txt", "merges.txt", "tokenizer.model", "*.tiktoken")
_LICENCES = ("LICENSE*", "NOTICE*")

#: A vocabulary as the base has it, of megabytes, which nobody of this machine wrote in.
_VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "*.tiktoken", "*.index.json")


@dataclass(frozen=True)
class PublishedFile:
    """A file as it will stand in the repository.

    Attributes:
        name: Its path there.
        content: Its place on this disk, or its bytes where they are not those of a file.
        size: In bytes.
    """

    name: str
    content: Path | bytes
    size: int
    sha256: str

    @classmethod
    def of(cls, name: str, content: Path | bytes) -> PublishedFile:
        """Measure a file or bytes."""
        if isinstance(content, bytes):
            return cls(name, content, len(content), hashlib.sha256(content).hexdigest())
        return cls(name, content, content.stat().st_size, layout.file_sha256(content))


def is_ours(name: str) -> bool:
    """Whether `share` may have put a file of this name into a repository, and so may take it away again."""
    folder, _, last = name.rpartition("/")
    if folder == ADAPTER_FOLDER:
        return last in ("adapters.safetensors", "adapter_config.json")
    if folder == DATA_FOLDER:
        return last in [f"{split}.jsonl" for split in layout.SPLITS]
    if folder == COMPARISON_FOLDER:
        return last == "results.md" or last in [f"{chart}.png" for chart in CHARTS]
    known = ("adapters.safetensors", "adapter_config.json", "metrics.jsonl", RECORD)
    return not folder and (last in known or any(fnmatchcase(last, pattern) for pattern in _MODEL_FILES))


def contents(config: ShareConfig, run: RunRecord, base: Base | None, comparison: Path | None) -> list[PublishedFile]:
    """All files but the card, checked, and without the places and credentials of this machine.

    Args:
        run: As it lies on the disk.
        comparison: Its folder, where there is one.

    Raises:
        InputError: A file is missing or damaged, or seems to hold a credential.
        ModelError: The fused model is missing pieces, or was made from another adapter.
    """
    files = layout.RunFolder(config.run)
    public = clean_run(run, base)
    found: dict[str, Path | bytes] = {RECORD: _text(f"{public.model_dump_json(indent=2, exclude_none=True)}\n")}
    if files.metrics.exists():
        found["metrics.jsonl"] = files.metrics
    if config.what != "fused":
        prefix = f"{ADAPTER_FOLDER}/" if config.what == "both" else ""
        settings = {**read_adapter_config(files.adapter_config), "model": base.hub_id if base else public.model.name}
        check_adapter(files.adapter, settings)
        found[f"{prefix}adapters.safetensors"] = files.adapter
        found[f"{prefix}adapter_config.json"] = _text(json.dumps(settings, indent=2) + "\n")
    if config.what != "adapter":
        found |= _fused(config.run, public)
    if comparison is not None:
        places = places_of(run, config.run, comparison)
        found |= _comparison(layout.ComparisonFolder(comparison), places)
    if config.data:
        found |= _rows(Path(run.config.get("data", "")), run)
    for name, content in found.items():
        _check_text(name, content)
    return [PublishedFile.of(name, found[name]) for name in sorted(found)]


def _fused(run_folder: Path, public: RunRecord) -> Iterator[tuple[str, Path | bytes]]:
    folder = layout.RunFolder(run_folder).fused
    record = read_fused(folder, run_folder)
    check_folder(folder)
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in (RECORD, "adapter_config.json") or not path.is_file():
            continue
        if path == layout.fused_record(folder):
            cleaned = clean_fused(record, public)
            yield path.name, _text(cleaned.model_dump_json(indent=2, exclude_none=True) + "\n")
        elif path.suffix == ".json" and not _is_vocabulary(path.name):
            try:
                yield path.name, _text(clean_json(path.read_text(encoding="utf-8")))
            except ValueError as error:
                raise ModelError(f"{path} is not JSON ({error}).", hint=f"mlx-distill fuse {run_folder}") from None
        elif any(fnmatchcase(path.name, pattern) for pattern in (*_MODEL_FILES, *_LICENCES)):
            yield path.name, path


def _comparison(folder: layout.ComparisonFolder, places: Mapping[str, str]) -> Iterator[tuple[str, Path | bytes]]:
    if not folder.results.exists():
        return
    text = folder.results.read_text(encoding="utf-8")
    yield f"{COMPARISON_FOLDER}/results.md", _text(without_places(text, places))
    for chart in CHARTS:
        if (path := folder.chart(chart)).exists():
            yield f"{COMPARISON_FOLDER}/{path.name}", path


def _rows(data: Path, run: RunRecord) -> Iterator[tuple[str, Path | bytes]]:
    for split, summary in run.splits.items():
        path = layout.DataFolder(layout.find_input(data)).split(split)
        if not path.is_file():
            raise InputError("no such file, and the run was trained on it.", path=path, hint="Leave --data out.")
        if layout.file_sha256(path) != summary.sha256:
            raise InputError(
                "these are not the rows that the run was trained on: the file has changed since.",
                path=path,
                hint="Bring them back, train again, or leave --data out.",
            )
        yield f"{DATA_FOLDER}/{split}.jsonl", path


def _check_text(name: str, content: Path | bytes) -> None:
    if name.endswith((".safetensors", ".png", ".model")) or _is_vocabulary(name):
        return
    data = content if isinstance(content, bytes) else content.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise InputError("is not text in UTF-8.", path=content if isinstance(content, Path) else name) from None
    where = name if isinstance(content, bytes) else str(content)
    require_no_credentials(where, text, rows=name.endswith(".jsonl"))


def _is_vocabulary(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in _VOCABULARIES)


def _text(text: str) -> bytes:
    return text.encode()
