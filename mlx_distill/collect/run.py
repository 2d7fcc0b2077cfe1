"""The step `collect`: ask a teacher every prompt, and make a data set of its answers.

Reads: a prompt file, and the folder's own ledger.  Writes: `ledger.db`, the splits and `manifest.json`.

The ledger is the truth: it can be left and taken up again at any moment, and what it holds is not asked again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mlx_distill.asking import ask_all, run_interruptible
from mlx_distill.collect.splits import refuse_foreign, write_data_set
from mlx_distill.config import CollectConfig
from mlx_distill.errors import FolderError, TeacherError, TeacherUnavailableError
from mlx_distill.layout import DataFolder, lock
from mlx_distill.ledger import Ledger
from mlx_distill.progress import SILENT, Progress
from mlx_distill.prompts import load_prompts
from mlx_distill.records import Manifest, Message, Prompt, Request, TeacherTerms
from mlx_distill.teachers.base import Teacher, request_name
from mlx_distill.teachers.registry import open_teacher

#: Raised when a change makes the same answers give another data set.
CODE_FORMAT = 1


def collect_from_spec(config: CollectConfig, progress: Progress = SILENT) -> Manifest:
    """Open the teacher that the settings name, collect, and close it; for callers outside an event loop.

    Raises:
        KeyboardInterrupt: Interrupted; all answers so far are in the ledger.
        MlxDistillError: As `collect` and `open_teacher`.
    """

    async def whole() -> Manifest:
        teacher = open_teacher(config.teacher)
        try:
            return await collect(config, teacher, progress)
        finally:
            await teacher.close()

    return run_interruptible(whole())


async def collect(config: CollectConfig, teacher: Teacher, progress: Progress = SILENT) -> Manifest:
    """Ask every prompt that has no reply yet, then write the data set.

    Args:
        teacher: Already open; it is left open.

    Returns:
        The manifest. Prompts that failed are counted in it, and are asked again by the next call.

    Raises:
        TeacherError: Its terms were not accepted (nothing is sent), or no answer can be trained on.
        TeacherUnavailableError: It can answer nothing until the user acts; what was answered is kept.
        FolderError: Another process collects into the folder, or it holds something else.
        InputError: The prompts or the ledger cannot be read.
        asyncio.CancelledError: Cancelled; answers under way were waited for, and all are kept.
    """
    terms = _accepted(teacher.terms(), config)
    requests = [_request(prompt, teacher, config) for prompt in load_prompts(config.prompts)]
    folder = DataFolder(config.out)
    with _held(folder), Ledger(folder.ledger) as ledger:
        try:
            await ask_all(requests, teacher, ledger, concurrency=config.concurrency, progress=progress)
        except TeacherUnavailableError as error:
            counts = ledger.counts(request.key for request in requests)
            have = counts["answered"] + counts["refused"] + counts["truncated"]
            raise TeacherUnavailableError(
                f"{error.message}\n  {have} of {len(requests)} prompts have their answer in {folder.ledger}.",
                hint=error.hint,
            ) from None
        return write_data_set(
            folder,
            ledger,
            requests,
            teacher=teacher.spec,
            terms=terms,
            valid_fraction=config.valid_fraction,
            test_fraction=config.test_fraction,
        )


def require_all_answered(manifest: Manifest) -> None:
    """Refuse to go on with a collection some of whose prompts failed.

    Raises:
        TeacherError: Says how many, and that the same command asks again for these alone.
    """
    failed = next((drop for drop in manifest.dropped if drop.reason == "failed"), None)
    if failed is not None:
        raise TeacherError(
            f"{failed.count} of {manifest.prompts} prompts failed: {', '.join(failed.prompt_ids[:5])}"
            f"{' and more' if failed.count > 5 else ''}.",
            hint="The same command asks again, and only what failed.",
        )


def _accepted(terms: TeacherTerms, config: CollectConfig) -> TeacherTerms:
    if not terms.requires_acceptance:
        return terms
    if not config.accept_terms:
        see = f" See {terms.url}." if terms.url else ""
        raise TeacherError(
            f"{terms.teacher}: {terms.summary}{see}",
            hint="If you have that right, say so with --accept-terms (in a recipe: collect.accept_terms = true).",
        )
    return terms.model_copy(update={"accepted": True})


def _request(prompt: Prompt, teacher: Teacher, config: CollectConfig) -> Request:
    return Request(
        prompt_id=prompt.id,
        family=prompt.family,
        teacher=request_name(teacher),
        messages=(Message(role="user", content=prompt.text),),
        system=prompt.system or config.system or None,
        max_tokens=config.max_tokens,
    )


@contextmanager
def _held(folder: DataFolder) -> Iterator[None]:
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(
            f"{folder.root} cannot be made a folder: {error.strerror}.", hint="Choose another --out."
        ) from None
    refuse_foreign(folder)
    with lock(folder.root):
        yield
