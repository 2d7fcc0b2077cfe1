"""The step `pull`.

Reads: a repository of the Hugging Face Hub, safetensors and text alone.
Writes: adapters/NAME/{adapters.safetensors,adapter_config.json,run.json,metrics.jsonl,README.md}, all or nothing; of an
adapter in PEFT's layout, adapters/NAME.peft/ as it is, for `import-adapter`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill import __version__, layout
from mlx_distill.config import PullConfig
from mlx_distill.errors import ConfigError, InputError, ModelError, OccupiedError
from mlx_distill.models.hub import HUB_ID, offline
from mlx_distill.models.hub_errors import endpoint, translated
from mlx_distill.progress import SILENT, Progress
from mlx_distill.records import ModelRecord, content_hash
from mlx_distill.run_records import MetricRow, RunRecord
from mlx_distill.share.adapter import check_adapter, read_adapter_config, tensor_shapes
from mlx_distill.share.base import name_base
from mlx_distill.share.cleaning import clean_run
from mlx_distill.share.listing import PEFT_WEIGHTS, Listing, RemoteFile, choose
from mlx_distill.share.session import patient_session, patiently

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

_DAMAGED = "Nothing of it was kept. Its owner can publish it again:  mlx-distill share"
_HOWTO = "Name it as organisation/name, or organisation/name@revision."


@dataclass(frozen=True)
class Pulled:
    """What was taken.

    Attributes:
        folder: Where it lies.
        kind: "mlx" for a run; "peft" for a folder that `import-adapter` makes one of.
        base: The base model's spec; None where only `import-adapter` will find out.
        run: The folder of the run; for "peft", of the one to make.
        fresh: False where it was there already.
    """

    folder: Path
    repo: str
    commit: str
    kind: str
    base: str | None
    run: Path
    fresh: bool


def pull(config: PullConfig, progress: Progress = SILENT) -> Pulled:
    """Take an adapter from the Hub.

    Raises:
        ConfigError: The name cannot be one.
        ModelError: The Hub has no such adapter, does not give it, cannot be reached, or holds it as a pickle.
        InputError: A file is damaged, too large, or is named so that it would lie outside its folder.
        OccupiedError: The folder holds something else.
        ResourceError: It does not fit on the disk.
    """
    match = HUB_ID.fullmatch(config.repo)
    if match is None:
        raise ConfigError(f"repo = {config.repo!r} is not a name of the Hub.", hint=_HOWTO)
    if offline():
        raise ModelError(
            f"{config.repo} cannot be pulled: the Hub is not asked (MLX_DISTILL_OFFLINE or HF_HUB_OFFLINE).",
            hint="Unset these.",
        )
    from huggingface_hub import HfApi

    source = _Source(HfApi(endpoint=endpoint(), library_name="mlx-distill"), match["id"], progress)
    root = config.run or Path("adapters") / match["id"].rpartition("/")[2]
    with patient_session():
        info = source.info(match["revision"])
        commit = str(info.sha)
        files = _files(info)
        listing = choose(source.repo, files)
        folder = root if listing.kind == "mlx" else root.with_name(f"{root.name}.peft")
        if _is_there(folder, listing, files[listing.weights]):
            base = layout.read_record(layout.RunFolder(folder).record, RunRecord).model.spec if folder == root else None
            return Pulled(folder, source.repo, commit, listing.kind, base, root, fresh=False)
        layout.require_disk(folder, 2 * sum(files[name].size for name in listing.wanted), what=f"{source.repo}")
        fetched = source.fetch(listing, files, commit)
        with layout.atomic_folder(folder) as temporary, _told_of(source.repo, temporary):
            for name, path in fetched.items():
                shutil.copyfile(path, temporary / name)
            if listing.kind == "mlx":
                base = _make_run(temporary, source, info)
            else:
                base = None
                _check_peft(temporary)
    return Pulled(folder, source.repo, commit, listing.kind, base, root, fresh=True)


@dataclass(frozen=True)
class _Source:
    """A repository."""

    api: HfApi
    repo: str
    progress: Progress

    def info(self, revision: str | None, repo: str | None = None) -> ModelInfo:
        asked = repo or self.repo
        return translated(
            lambda: patiently(
                lambda: self.api.model_info(asked, revision=revision, files_metadata=True),
                what=f"Looking at {asked}",
                progress=self.progress,
            ),
            asked,
            revision,
        )

    def fetch(self, listing: Listing, files: dict[str, RemoteFile], commit: str) -> dict[str, Path]:
        """The files in the Hub's cache, by their name in the folder; each is what the Hub said it is."""
        found: dict[str, Path] = {}
        total = round(sum(files[name].size for name in listing.wanted) / 1e6, 1)
        with self.progress.task(f"Downloading {self.repo}", total, unit="MB") as bar:
            for remote, local in listing.wanted.items():
                path = Path(self._download(remote, commit))
                if not _is(path, files[remote]):
                    raise InputError(
                        f"{self.repo}: {remote} arrived as another file than the Hub lists.",
                        path=path,
                        hint="Remove it and run the same command again.",
                    )
                found[local] = path
                bar.advance(files[remote].size / 1e6)
        return found

    def _download(self, name: str, commit: str) -> str:
        return translated(
            lambda: patiently(
                lambda: self.api.hf_hub_download(self.repo, name, revision=commit),
                what=f"Downloading {name}",
                progress=self.progress,
            ),
            self.repo,
            commit,
        )


@contextmanager
def _told_of(repo: str, folder: Path) -> Iterator[None]:
    """Let errors name the files by the repository that they are from, not by a folder that will be gone."""
    try:
        yield
    except InputError as error:
        raise InputError(error.message.replace(f"{folder}/", f"{repo}/"), hint=_DAMAGED) from None


def _files(info: ModelInfo) -> dict[str, RemoteFile]:
    found = {}
    for file in info.siblings or []:
        sha256 = file.lfs.sha256 if file.lfs else None
        found[file.rfilename] = RemoteFile(file.size or 0, sha256, None if sha256 else file.blob_id)
    return found


def _is(path: Path, file: RemoteFile) -> bool:
    """Whether a file on the disk is the one that the Hub lists."""
    if path.stat().st_size != file.size:
        return False
    if file.sha256 is not None:
        return layout.file_sha256(path) == file.sha256
    if file.git_hash is None:
        return True
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == file.git_hash


def _is_there(folder: Path, listing: Listing, weights: RemoteFile) -> bool:
    """Whether a folder holds this very adapter already."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    local = folder / listing.wanted[listing.weights]
    record = layout.RunFolder(folder).record
    if local.is_file() and _is(local, weights) and (listing.kind == "peft" or record.is_file()):
        return True
    raise OccupiedError(f"{folder} holds something else.", hint="Choose another folder:  --run adapters/NAME")


def _make_run(folder: Path, source: _Source, info: ModelInfo) -> str:
    """Make a run of what came, and check it; returns the base's spec."""
    files = layout.RunFolder(folder)
    settings = read_adapter_config(files.adapter_config)
    parameters = check_adapter(files.adapter, settings)
    layout.read_rows(files.metrics, MetricRow)
    if files.record.exists():
        record = layout.read_record(files.record, RunRecord)
        base = name_base(record.model)
        if base is None or record.status != "finished":
            raise InputError("is not the record of a finished run on a model of the Hub.", path=files.record)
        record = clean_run(record, base)
    else:
        record = _minimal_record(settings, parameters, source, info, layout.file_sha256(files.adapter))
    layout.write_text(files.record, record.model_dump_json(indent=2, exclude_none=True) + "\n")
    return record.model.spec


def _minimal_record(
    settings: dict[str, Any], parameters: int, source: _Source, info: ModelInfo, sha256: str
) -> RunRecord:
    """A record for an adapter that came without one, such as `mlx_lm.lora`'s: what its configuration says."""
    model = settings.get("model")
    match = HUB_ID.fullmatch(model) if isinstance(model, str) else None
    if match is None:
        raise InputError(
            f"names no base model of the Hub (model: {json.dumps(model)}).", path=f"{source.repo}/adapter_config.json"
        )
    base = source.info(match["revision"], match["id"])
    stated = getattr(base.card_data, "license", None)
    spec = f"{match['id']}@{base.sha}"
    lora = settings["lora_parameters"]
    return RunRecord(
        identity=content_hash([spec, sha256]),
        status="finished",
        created=(info.last_modified or datetime.now(UTC)).isoformat(timespec="seconds"),
        version=__version__,
        backend="mlx",
        device="unknown",
        model=ModelRecord(
            spec=spec,
            source="hub",
            path="",
            name=match["id"].rpartition("/")[2],
            revision=base.sha,
            licence=stated if isinstance(stated, str) else None,
        ),
        config={
            "model": spec,
            "adapter": settings.get("fine_tune_type", "lora"),
            "rank": lora["rank"],
            "scale": lora["scale"],
            "dropout": lora.get("dropout", 0.0),
            "layers": settings["num_layers"] if settings["num_layers"] > 0 else "all",
            "rslora": False,
        },
        splits={},
        trainable_parameters=parameters,
    )


def _check_peft(folder: Path) -> None:
    path = folder / "adapter_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not JSON ({error}).", path=path) from None
    if not isinstance(settings, dict) or "peft_type" not in settings:
        raise InputError("is not a configuration of PEFT's: it names no peft_type.", path=path)
    tensor_shapes(folder / PEFT_WEIGHTS)
