"""The step `share`.

Reads: adapters/RUN/{run.json,adapters.safetensors,adapter_config.json,metrics.jsonl,fused/}, visuals/RUN/ and, where
that is asked for, the rows of data/NAME/.
Writes: a repository of the Hugging Face Hub, in one commit; nothing on this disk.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from mlx_distill import layout
from mlx_distill.config import ShareConfig
from mlx_distill.errors import ConfigError, InputError
from mlx_distill.models.hub import HUB_ID
from mlx_distill.progress import SILENT, Progress
from mlx_distill.runs import read_run
from mlx_distill.share.card import model_card
from mlx_distill.share.cleaning import clean_run
from mlx_distill.share.contents import CARD, PublishedFile, contents
from mlx_distill.share.refusals import require_base, require_no_credentials, require_shareable_rows
from mlx_distill.share.scores import judges_adapter, read_scores
from mlx_distill.share.upload import Upload, upload


@dataclass(frozen=True)
class Shared:
    """What was published, or would be.

    Attributes:
        files: With the card, by name.
        upload: None where nothing was sent.
    """

    repo: str
    files: tuple[PublishedFile, ...]
    card: str
    upload: Upload | None

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(file.size for file in self.files)


def share(config: ShareConfig, progress: Progress = SILENT) -> Shared:
    """Publish a run, or show what would be published.

    Raises:
        ConfigError: The repository's name cannot be one.
        InputError: The run or a file of it is missing, damaged, or not to be published: a credential, or rows whose
            teacher's terms forbid it.
        ModelError: The base has no name that others know, the fused model is of another adapter, or the Hub refuses.
    """
    _require_repository_name(config.repo)
    run = read_run(config.run)
    with nullcontext() if config.dry_run else layout.lock(config.run):
        base = require_base(run, config.run, needed=config.what != "fused")
        if config.data:
            require_shareable_rows(run, layout.find_input(Path(str(run.config.get("data", "")))))
        comparison = _comparison(config, progress)
        with progress.task("Reading and checking what is to be published"):
            files = contents(config, run, base, comparison)
        card = model_card(config, clean_run(run, base), base, read_scores(comparison) if comparison else None, files)
        require_no_credentials(CARD, card, rows=False)
        files = sorted([*files, PublishedFile.of(CARD, card.encode())], key=lambda file: file.name)
        sent = None
        if not config.dry_run:
            message = config.message or f"Publish {config.run.resolve().name} with mlx-distill"
            sent = upload(files, config.repo, public=config.public, message=message, progress=progress)
    return Shared(config.repo, tuple(files), card, sent)


def _comparison(config: ShareConfig, progress: Progress) -> Path | None:
    """The folder of the comparison whose scores are those of this adapter; None where there is none.

    Raises:
        InputError: One was named, and it is not there or is of another adapter.
    """
    folder = config.comparison or Path("visuals") / config.run.resolve().name
    hint = f"Make it:  mlx-distill compare {config.run} --prompts FILE --out {folder}"
    if not layout.ComparisonFolder(folder).generations.exists():
        if config.comparison is not None:
            raise InputError("there is no comparison here.", path=folder, hint=hint)
        return None
    adapter = layout.RunFolder(config.run).adapter
    if judges_adapter(folder, layout.file_sha256(adapter)):
        return folder
    if config.comparison is not None:
        raise InputError(f"its answers are of another adapter than {adapter}.", path=folder, hint=hint)
    progress.say(f"{folder} has answers of another adapter than {adapter}; its scores are left out.")
    return None


def _require_repository_name(repo: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    match = HUB_ID.fullmatch(repo)
    problem = None if match and not match["revision"] else "it is not organisation/name"
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        problem = problem or str(error)
    if problem:
        raise ConfigError(
            f"repo = {repo!r} names no repository of the Hub: {problem}.",
            hint="Name it as organisation/name; your user name is an organisation too.",
        )
