"""Files into a repository of the Hub: large ones first, each on its own, then all that changed in one commit.

A commit is whole or is not made. Files that were sent before it are kept by the Hub, which knows them by their hash:
a second try sends only what is missing.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mlx_distill.errors import MlxDistillError, ModelError, ResourceError
from mlx_distill.models.hub import offline
from mlx_distill.models.hub_errors import endpoint, translated
from mlx_distill.progress import Bar, Progress
from mlx_distill.share.contents import CARD, RECORD, PublishedFile, is_ours
from mlx_distill.share.session import patient_session, patiently

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

T = TypeVar("T")

#: Files of at least as many bytes are sent on their own, before the commit.
LARGE = 1_000_000

#: What the Hub puts into a new repository, and what a person does before there is anything in it.
_PREPARED = (".gitattributes", CARD)


@dataclass(frozen=True)
class Upload:
    """How an upload ended.

    Attributes:
        url: Of the repository.
        created: Whether it is new.
        changed: Whether a commit was made; none is where all files are there already.
        removed: Files of an earlier publication that are no part of this one.
    """

    url: str
    commit: str
    private: bool
    created: bool
    changed: bool
    removed: tuple[str, ...] = ()


def upload(files: Sequence[PublishedFile], repo: str, *, public: bool, message: str, progress: Progress) -> Upload:
    """Publish files in a repository, which is made if need be.

    Args:
        files: All that it shall hold; what an earlier publication left beside them is taken away.
        repo: "organisation/name".
        public: Whether the files may be seen by all.

    Raises:
        ModelError: The Hub refuses, cannot be reached, or the repository is not one to put this into.
    """
    from huggingface_hub import HfApi, get_token

    if offline():
        raise ModelError(
            f"{repo} cannot be published: the Hub is not asked (MLX_DISTILL_OFFLINE or HF_HUB_OFFLINE).",
            hint="Unset these, or look at what would be published:  --dry-run",
        )
    if not get_token():
        raise ModelError(
            f"{repo} cannot be published: there is no token for the Hub.",
            hint="Log in with one that may write:  hf auth login",
        )
    api = HfApi(endpoint=endpoint(), library_name="mlx-distill")
    with patient_session():
        work = _Work(api, repo, progress)
        before, created = work.repository(public=public)
        work.send_large(files)
        commit, removed = work.commit(files, message)
        return Upload(
            url=f"{api.endpoint}/{repo}",
            commit=commit,
            private=bool(before.private),
            created=created,
            changed=commit != before.sha,
            removed=removed,
        )


@dataclass(frozen=True)
class _Work:
    """The steps of one upload."""

    api: HfApi
    repo: str
    progress: Progress

    def repository(self, *, public: bool) -> tuple[ModelInfo, bool]:
        """What the repository holds, and whether it was made for this."""
        info = self.ask(missing_is_none=True)
        created = info is None
        if info is None:
            self.call(
                "Making the repository", lambda: self.api.create_repo(self.repo, private=not public, exist_ok=True)
            )
            info = self.ask()
            assert info is not None
        if not info.private and not public:
            raise ModelError(
                f"{self.repo} is public, and what is put there can be seen by all.",
                hint="If that is meant:  --public. Else name another repository, or make this one private in its "
                "settings.",
            )
        if public and info.private:
            self.progress.say(f"{self.repo} is private and stays so; its settings on the Hub can make it public.")
        names = {file.rfilename for file in info.siblings or []}
        if RECORD not in names and (others := sorted(names.difference(_PREPARED) - _licences(names))):
            raise ModelError(
                f"{self.repo} holds {', '.join(others[:3])}{' …' if others[3:] else ''}, which mlx-distill did not "
                "put there.",
                hint="Name another repository; a new one is made.",
            )
        return info, created

    def ask(self, *, missing_is_none: bool = False) -> ModelInfo | None:
        """What the Hub says of the repository."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def look() -> ModelInfo | None:
            try:
                return self.api.model_info(self.repo)
            except RepositoryNotFoundError as error:
                if missing_is_none and error.response.status_code == 404:
                    return None
                raise

        return self.call("Looking at the repository", look)

    def send_large(self, files: Sequence[PublishedFile]) -> None:
        """Send what is large, file by file, so that each that arrived stays."""
        large = [file for file in files if file.size >= LARGE]
        if not large:
            return
        total = round(sum(file.size for file in large) / 1e6, 1)
        with self.progress.task(f"Uploading to {self.repo}", total, unit="MB") as bar:
            for file in large:
                meter = _Meter(bar, file.size)
                self.call(
                    f"Uploading {file.name}",
                    lambda file=file, meter=meter: self.api.preupload_lfs_files(  # type: ignore[misc]
                        self.repo, [_addition(file, meter)], free_memory=False
                    ),
                )
                # What the Hub had already, or read in another way than through the meter.
                meter.finish()

    def commit(self, files: Sequence[PublishedFile], message: str) -> tuple[str, tuple[str, ...]]:
        """Make the one commit; returns its hash, and what it took away."""
        from huggingface_hub import CommitOperationDelete

        def commit() -> tuple[str, tuple[str, ...]]:
            # Asked again at each try: one whose answer was lost may have been made.
            info = self.api.model_info(self.repo)
            kept = {file.name for file in files}
            left = sorted(s.rfilename for s in info.siblings or [] if s.rfilename not in kept and is_ours(s.rfilename))
            operations: list[Any] = [_addition(file) for file in files]
            operations += [CommitOperationDelete(name) for name in left]
            made = self.api.create_commit(self.repo, operations, commit_message=message)
            return made.oid, tuple(left)

        with self.progress.task(f"Committing {len(files)} files"):
            return self.call("Making the commit", commit)

    def call(self, what: str, make: Callable[[], T]) -> T:
        """Make a call of huggingface_hub with patience, its errors and warnings turned into ours."""
        from huggingface_hub.errors import HfHubHTTPError

        with _warnings_told(self.progress):
            try:
                return translated(lambda: _bare(lambda: patiently(make, what=what, progress=self.progress)), self.repo)
            except _RefusedError as error:
                assert isinstance(error.__cause__, HfHubHTTPError)
                raise _refused(what, self.repo, error.__cause__) from None
            except MlxDistillError:
                raise
            except (ValueError, RuntimeError) as error:
                said = " ".join(str(error).split())[:300]
                raise ModelError(f"{what}: the Hub does not take it ({said}).") from error


class _RefusedError(Exception):
    """An answer of the Hub, its cause, that no waiting changes."""


def _bare(call: Callable[[], T]) -> T:
    """Make a call; where the Hub refused it, that is raised, without what huggingface_hub put around it."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return call()
    except MlxDistillError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, HfHubHTTPError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise _RefusedError from cause


def _refused(what: str, repo: str, error: Any) -> MlxDistillError:
    """An answer of the Hub that no waiting changes."""
    status = error.response.status_code
    owner = repo.partition("/")[0]
    said = " ".join((error.server_message or "").split())[:200]
    because = f": {said}" if said else ""
    if status == 401:
        return ModelError(
            f"{what}: the Hub does not know your token (any more){because}.",
            hint="Log in with one that may write:  hf auth login",
        )
    if status == 403:
        return ModelError(
            f"{what}: your token may not write to {repo}{because}.",
            hint=f"Make one that may write to {owner}, at https://huggingface.co/settings/tokens, then:  hf auth login",
        )
    if status == 404:
        return ModelError(
            f"{what}: the Hub has no {repo}{because}.",
            hint=f"Check that {owner} is your name there, or an organisation of yours:  hf auth whoami",
        )
    if status in (409, 412):
        return ModelError(
            f"{what}: {repo} was changed by another at the same time{because}.", hint="Run the same command again."
        )
    if status in (402, 413, 507):
        return ResourceError(f"{what}: the Hub has no room for it ({status}){because}.", hint="See your storage there.")
    return ModelError(
        f"{what}: the Hub answered {status}{because}.",
        hint="The same command goes on from there; what was sent is not sent again.",
    )


def _licences(names: set[str]) -> set[str]:
    return {name for name in names if name.startswith(("LICENSE", "NOTICE"))}


@contextmanager
def _warnings_told(progress: Progress) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        progress.say(f"The Hub's library warns: {' '.join(str(warning.message).split())}")


class _Meter:
    """Tells a bar how much of a file went out, each byte once, also where it is sent again."""

    def __init__(self, bar: Bar, size: int) -> None:
        self._bar, self._size, self._seen = bar, size, 0

    def reached(self, position: int) -> None:
        if position > self._seen:
            self._bar.advance((position - self._seen) / 1e6)
            self._seen = position

    def finish(self) -> None:
        self.reached(self._size)


class _MeteredFile(io.BufferedReader):
    def __init__(self, path: Path, meter: _Meter) -> None:
        super().__init__(io.FileIO(path))
        self._meter = meter

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self._meter.reached(self.tell())
        return data


def _addition(file: PublishedFile, meter: _Meter | None = None) -> Any:
    """A file as huggingface_hub wants it, its hash known."""
    from huggingface_hub import CommitOperationAdd

    class Addition(CommitOperationAdd):
        @contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[Any]:
            if meter is None or isinstance(file.content, bytes):
                with super().as_file() as opened:
                    yield opened
            else:
                with _MeteredFile(file.content, meter) as opened:
                    yield opened

    addition = Addition(file.name, file.content)
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)
    return addition
