"""Models from the Hugging Face Hub: downloaded once into its own cache, and used from there.

Only weights in safetensors and plain text files are fetched, never Python code or pickles.
"""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill import layout
from mlx_distill.errors import ModelError
from mlx_distill.models.hub_errors import endpoint, translated
from mlx_distill.progress import SILENT, Bar, Progress

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_WANTED = ("model*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md", "LICENSE*")
_UNWANTED = ("*/*", "consolidated*")

_COMMIT = re.compile(r"[0-9a-f]{40}")

#: "organisation/name" or "organisation/name@revision".
HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


def offline() -> bool:
    """Whether the user wants no word with the Hub (`MLX_DISTILL_OFFLINE` or `HF_HUB_OFFLINE`)."""
    return any(
        os.environ.get(name, "").lower() in ("1", "true", "yes", "on")
        for name in ("MLX_DISTILL_OFFLINE", "HF_HUB_OFFLINE")
    )


def fetch(
    repo_id: str, revision: str | None = None, *, timeout: float = 10.0, progress: Progress = SILENT
) -> tuple[Path, str]:
    """The folder of a Hub model and the commit it holds; downloaded if the cache lacks it.

    A copy in the cache is used when the Hub cannot be reached or refuses, and at once when `revision` is a whole
    commit hash.

    Args:
        repo_id: "organisation/name".
        revision: Branch, tag or commit; the main branch without it.
        timeout: Seconds to wait for the Hub's first word.

    Raises:
        ModelError: It is not there, not open to this user, holds no safetensors, or the Hub cannot be reached.
        ResourceError: It does not fit on the disk.
    """
    from huggingface_hub import snapshot_download

    named = f"{repo_id}@{revision}" if revision else repo_id
    if offline() or (revision and _COMMIT.fullmatch(revision)):
        if found := cached(repo_id, revision):
            return found
        if offline():
            raise ModelError(
                f"{named} is not in the Hub's cache, and the Hub is not asked (MLX_DISTILL_OFFLINE or HF_HUB_OFFLINE).",
                hint="Unset these to download it, or name a folder or a .gguf file.",
            )
    try:
        info = _ask(repo_id, revision, timeout)
    except ModelError as error:
        if found := cached(repo_id, revision):
            progress.say(f"{error.message} Using the copy of {named} in the cache.")
            return found
        raise
    assert info.sha is not None
    known = cached(repo_id, info.sha) is not None
    if not known:
        _require_downloadable(info)
    with _bar(info, SILENT if known else progress) as bar:
        # Asked for by its name even where the commit is there already: the cache then knows the name offline too.
        folder = translated(
            lambda: snapshot_download(
                repo_id,
                revision=revision,
                endpoint=endpoint(),
                allow_patterns=list(_WANTED),
                ignore_patterns=list(_UNWANTED),
                tqdm_class=_bridge(bar),
            ),
            repo_id,
            revision,
        )
    return Path(folder), Path(folder).name


def cached(repo_id: str, revision: str | None = None) -> tuple[Path, str] | None:
    """Folder and commit of a whole copy in the Hub's cache, without a word to the Hub; None if there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    from mlx_distill.models.folder import check_folder

    try:
        folder = Path(
            snapshot_download(
                repo_id,
                revision=revision,
                local_files_only=True,
                allow_patterns=list(_WANTED),
                ignore_patterns=list(_UNWANTED),
            )
        )
        check_folder(folder)
    except (LocalEntryNotFoundError, HFValidationError, ModelError):
        return None
    return folder, folder.name


def cached_ids() -> list[str]:
    """The ids of all models that have something in the Hub's cache."""
    from huggingface_hub import constants

    folders = Path(constants.HF_HUB_CACHE).glob("models--*--*")
    return sorted(folder.name.removeprefix("models--").replace("--", "/", 1) for folder in folders)


def _ask(repo_id: str, revision: str | None, timeout: float) -> ModelInfo:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint(), library_name="mlx-distill")
    return translated(
        lambda: api.model_info(repo_id, revision=revision, timeout=timeout, files_metadata=True), repo_id, revision
    )


def _files(info: ModelInfo) -> dict[str, int]:
    """The files of a repository that are wanted, with their sizes in bytes."""

    def wanted(name: str) -> bool:
        return any(fnmatch(name, p) for p in _WANTED) and not any(fnmatch(name, p) for p in _UNWANTED)

    return {file.rfilename: file.size or 0 for file in info.siblings or [] if wanted(file.rfilename)}


def _require_downloadable(info: ModelInfo) -> None:
    from huggingface_hub import constants

    files = _files(info)
    if not any(name.endswith(".safetensors") for name in files):
        others = sorted(s.rfilename for s in info.siblings or [] if s.rfilename.endswith((".bin", ".pt", ".gguf")))
        holds = f"; it holds {', '.join(others[:3])}" if others else ""
        raise ModelError(
            f"{info.id} has no weights in safetensors{holds}.",
            hint="Choose a model in safetensors, or download a .gguf file and name its path.",
        )
    layout.require_disk(Path(constants.HF_HUB_CACHE), sum(files.values()), what=f"Downloading {info.id}")


def _bar(info: ModelInfo, progress: Progress) -> AbstractContextManager[Bar]:
    return progress.task(f"Downloading {info.id}", round(sum(_files(info).values()) / 1e6, 1), unit="MB")


def _bridge(bar: Bar) -> Any:
    """The class that huggingface_hub makes its progress bars of, drawing nothing and telling ours the bytes."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bridge(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Bytes are told twice: as they come over the wire, and as they reach the disk. The latter are counted.
            self._counts = kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts and n:
                bar.advance(n / 1e6)
            return None

    return Bridge
