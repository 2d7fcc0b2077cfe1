"""What of a repository is an adapter, by the names and sizes of its files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Literal

from mlx_distill.errors import InputError, ModelError
from mlx_distill.share.contents import ADAPTER_FOLDER, CARD, RECORD

_WEIGHTS, _CONFIG, _METRICS = "adapters.safetensors", "adapter_config.json", "metrics.jsonl"
PEFT_WEIGHTS = "adapter_model.safetensors"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz", ".npy")

#: Bytes that a file may have. Only weights are large.
_LIMITS = {_CONFIG: 1 << 20, RECORD: 16 << 20, CARD: 4 << 20, _METRICS: 512 << 20}
_WEIGHTS_LIMIT = 64 << 30


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository.

    Attributes:
        size: In bytes.
        sha256: Of a large file, as the Hub states it.
        git_hash: Of any other: git's SHA-1 of the blob.
    """

    size: int
    sha256: str | None = None
    git_hash: str | None = None


@dataclass(frozen=True)
class Listing:
    """The files to take.

    Attributes:
        kind: "mlx" for mlx-lm's layout, which is ours; "peft" for PEFT's.
        wanted: Path in the repository → name in the folder.
        weights: Path of the weights in the repository.
    """

    kind: Literal["mlx", "peft"]
    wanted: Mapping[str, str]
    weights: str


def choose(repo: str, files: Mapping[str, RemoteFile]) -> Listing:
    """Find the adapter in a repository.

    Raises:
        InputError: A name climbs out of its folder, or a file is larger than such a file can be.
        ModelError: There is no adapter, or only one that can run code.
    """
    for name in files:
        _require_confined(repo, name)
    for prefix in ("", f"{ADAPTER_FOLDER}/"):
        if {prefix + _WEIGHTS, prefix + _CONFIG} <= files.keys():
            wanted = {prefix + _WEIGHTS: _WEIGHTS, prefix + _CONFIG: _CONFIG}
            wanted |= {name: name for name in (RECORD, _METRICS, CARD) if name in files}
            return _bounded(repo, Listing("mlx", wanted, prefix + _WEIGHTS), files)
    if {PEFT_WEIGHTS, _CONFIG} <= files.keys():
        wanted = {name: name for name in (PEFT_WEIGHTS, _CONFIG, CARD) if name in files}
        return _bounded(repo, Listing("peft", wanted, PEFT_WEIGHTS), files)
    if pickles := sorted(name for name in files if name.endswith(_PICKLES)):
        raise ModelError(
            f"{repo} holds its weights as {', '.join(pickles[:3])}, which can run any code when they are loaded.",
            hint="Ask for a copy in safetensors.",
        )
    if "config.json" in files:
        raise ModelError(
            f"{repo} is a whole model, and no adapter.", hint=f"Use it as it is:  mlx_lm.generate --model {repo}"
        )
    raise ModelError(f"{repo} holds no adapter ({_WEIGHTS} or {PEFT_WEIGHTS}, and {_CONFIG}).")


def _require_confined(repo: str, name: str) -> None:
    parts = PurePosixPath(name).parts
    if (
        not parts
        or name.startswith("/")
        or ".." in parts
        or ".." in PureWindowsPath(name).parts
        or PureWindowsPath(name).anchor
        or not name.isprintable()
    ):
        raise InputError(
            f"{repo} names a file {name!r}, which climbs out of its folder; nothing of it is taken.",
            hint="Tell its owner, or the Hub.",
        )


def _bounded(repo: str, listing: Listing, files: Mapping[str, RemoteFile]) -> Listing:
    for remote, local in listing.wanted.items():
        limit = _LIMITS.get(local, _WEIGHTS_LIMIT)
        if files[remote].size > limit:
            raise InputError(
                f"{repo}: {remote} has {files[remote].size:,} bytes, and such a file has at most {limit:,}.",
                hint="Nothing of it was taken.",
            )
    return listing
