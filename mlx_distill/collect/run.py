"""The step `collect`: ask a teacher every prompt, and make a data set of its answers.

Reads: a file of prompts or tasks, and the folder's own ledgers.  Writes: `ledger.db`, the splits and `manifest.json`; a
judge that chooses among answers writes `judge.db`.

The ledger is the truth: it can be left and taken up again at any moment, and what it holds is not asked again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress

from mlx_distill.asking import ask_all, run_interruptible
from mlx_distill.budget import Budget
from mlx_distill.collect.batch import BatchCollection
from mlx_distill.collect.choosing import Scorer, spent
from mlx_distill.collect.cleaning import clean
from mlx_distill.collect.estimate import Estimate, estimate
from mlx_distill.collect.requests import PromptRequests, longer, outstanding, plan, planned
from mlx_distill.collect.splits import refuse_foreign, write_data_set
from mlx_distill.config import CollectConfig
from mlx_distill.errors import ConfigError, DependencyError, FolderError, TeacherError, TeacherUnavailableError
from mlx_distill.evaluation.tasks import read_prompts, refuse_builtin
from mlx_distill.layout import DataFolder, lock
from mlx_distill.ledger import Ledger
from mlx_distill.manifest import Manifest, TeacherTerms, unit_of
from mlx_distill.pricing import price_of
from mlx_distill.progress import SILENT, Progress
from mlx_distill.teachers.base import Teacher, request_name
from mlx_distill.teachers.batches import Batching
from mlx_distill.teachers.registry import check_sampling, open_teacher

#: Asks the user a question that can be answered by yes or no.
Confirm = Callable[[str], bool]

#: A collection expected to cost more, in US dollars, is not begun without a limit or the user's word.
ASK_ABOVE_USD = 5.0

#: Raised when a change makes the same answers give another data set.
CODE_FORMAT = 3


def collect_from_spec(
    config: CollectConfig,
    progress: Progress = SILENT,
    *,
    confirm: Confirm | None = None,
    scorer: Scorer | None = None,
) -> Manifest:
    """Open the teacher that the settings name, collect, and close it; for callers outside an event loop.

    Args:
        confirm: As for `collect`.
        scorer: As for `collect`; it is closed at the end.

    Raises:
        KeyboardInterrupt: Interrupted; all answers so far are in the ledger.
        MlxDistillError: As `collect` and `open_teacher`.
    """

    async def whole() -> Manifest:
        async with AsyncExitStack() as opened:
            if scorer is not None:
                opened.push_async_callback(scorer.close)
            _check_sampling(config, config.teacher)  # Before a model is fetched for it.
            teacher = open_teacher(config.teacher, base_url=config.base_url)
            opened.push_async_callback(teacher.close)
            return await collect(config, teacher, progress, confirm=confirm, scorer=scorer)

    return run_interruptible(whole())


def estimate_from_spec(config: CollectConfig) -> Estimate:
    """What the collection that the settings describe would still cost. Sends nothing and needs no key.

    Raises:
        ConfigError: The teacher cannot be asked for so many answers to a prompt, or for such.
        InputError: The prompts or the ledger cannot be read.
    """
    _check_sampling(config, config.teacher)
    requests = _requests(config, _name_unopened(config))
    path = DataFolder(config.out).ledger
    if not path.exists():
        return estimate(requests, teacher=config.teacher, ceiling=config.ceiling)
    with Ledger(path) as ledger:
        return estimate(requests, teacher=config.teacher, ceiling=config.ceiling, ledger=ledger)


async def collect(
    config: CollectConfig,
    teacher: Teacher,
    progress: Progress = SILENT,
    *,
    confirm: Confirm | None = None,
    scorer: Scorer | None = None,
) -> Manifest:
    """Ask for every answer that has no reply yet, then write the data set.

    Args:
        teacher: Already open; it is left open.
        confirm: Asks the user before a collection that is expected to be dear and has no limit; None where nobody
            can be asked.
        scorer: Says which answers are best, where these are chosen; already open, and left open.

    Returns:
        The manifest. Requests that failed are counted in it, and are sent again by the next call; so are those that
        the budget left no room for, and those that a batch still holds. It is not written while there is nothing
        to train on.

    Raises:
        ConfigError: It is a dry run, nobody agreed to the cost, `max_cost` cannot be held, or the teacher cannot be
            asked for so many answers to a prompt, or for such. Nothing is sent.
        TeacherError: Its terms were not accepted (nothing is sent), no answer can be trained on, or the scorer did
            not score what is to be chosen from.
        TeacherUnavailableError: It can answer nothing until the user acts; what was answered is kept.
        FolderError: Another process collects into the folder, or it holds something else.
        InputError: The prompts, the held-out prompts or the ledger cannot be read.
        IsolationError, DependencyError: Answers cannot be verified as asked for; they are kept.
        asyncio.CancelledError: Cancelled; answers under way were waited for, and all are kept.
    """
    if config.dry_run:
        raise ConfigError("a dry run collects nothing.", hint="See its cost with  mlx-distill collect --dry-run")
    if config.choose == "best" and scorer is None:
        raise ConfigError("the best answers are to be chosen, and no judge was opened.", hint="See choose and judge.")
    _check_sampling(config, teacher.spec)
    terms = _accepted(teacher.terms(), config)
    requests = _requests(config, request_name(teacher))
    folder = DataFolder(config.out)
    with _held(folder), Ledger(folder.ledger) as ledger:
        Budget(price_of(teacher.spec), config.max_cost)  # Says so, where the limit cannot be held.
        _require_consent(config, requests, ledger, confirm)
        plan(ledger, requests)
        try:
            await _ask(config, requests, teacher, ledger, progress)
        except TeacherUnavailableError as error:
            counts = ledger.counts(request.key for request in requests)
            have = counts["answered"] + counts["refused"] + counts["truncated"]
            raise TeacherUnavailableError(
                f"{error.message}\n  {have} of {len(requests)} {unit_of(config.samples)} have their answer in "
                f"{folder.ledger}.",
                hint=error.hint,
            ) from None
        found = await clean(ledger, requests, config, progress, scorer)
        return write_data_set(
            folder,
            ledger,
            requests,
            teacher=teacher.spec,
            terms=terms,
            valid_fraction=config.valid_fraction,
            test_fraction=config.test_fraction,
            ceiling=config.ceiling,
            rules=(found.rule,),
            facts=found.facts,
        )


async def _ask(
    config: CollectConfig, requests: PromptRequests, teacher: Teacher, ledger: Ledger, progress: Progress
) -> None:
    price = price_of(teacher.spec)
    again = True
    if isinstance(teacher, Batching):
        batches = BatchCollection(teacher.spec, teacher.batches, ledger, Budget(price), progress)
        if await batches.settle_orphans(config.batch_orphan):
            return
        if batches.open:
            await batches.collect(wait=config.wait)
            again = False  # What failed just now is for the next command.
    elif config.batch:
        raise ConfigError(f"{teacher.spec} has no batches.", hint="Leave --batch away.")
    todo = outstanding(ledger, requests, config.ceiling, failed=again)
    budget = Budget(price, config.max_cost, spent(ledger))
    if not config.batch:
        await ask_all(
            todo,
            teacher,
            ledger,
            concurrency=config.concurrency,
            progress=progress,
            budget=budget,
            follow_up=lambda request, reply: longer(request, reply.stop, config.ceiling),
        )
        return
    assert isinstance(teacher, Batching)
    while True:
        batches = BatchCollection(teacher.spec, teacher.batches, ledger, budget, progress)
        await batches.submit(planned(ledger, todo))
        if not batches.open:
            return
        await batches.collect(wait=config.wait)
        if batches.open:
            return
        # Answers that were cut are asked again with more tokens.
        todo = outstanding(ledger, requests, config.ceiling, failed=False)
        budget = Budget(price, config.max_cost, spent(ledger))


def require_all_answered(manifest: Manifest) -> None:
    """Refuse to go on with a collection some of whose requests failed.

    Raises:
        TeacherError: Says how many, and that the same command asks again for these alone.
    """
    if manifest.unsent or manifest.in_batch:
        raise TeacherError(
            f"{manifest.unsent} of {manifest.asked} {manifest.unit} are not sent yet, {manifest.in_batch} are in a "
            "batch.",
            hint="Raise collect.max_cost for the first; for the others, give the same command later.",
        )
    failed = next((drop for drop in manifest.dropped if drop.reason == "failed"), None)
    if failed is not None:
        raise TeacherError(
            f"{failed.count} of {manifest.asked} {manifest.unit} failed: {', '.join(failed.prompt_ids[:5])}"
            f"{' and more' if len(failed.prompt_ids) > 5 else ''}.",
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


def _requests(config: CollectConfig, teacher: str) -> PromptRequests:
    prompts = read_prompts(config.prompts)
    refuse_builtin(config.prompts, prompts)
    return PromptRequests(
        prompts,
        teacher=teacher,
        system=config.system,
        max_tokens=config.max_tokens,
        samples=config.samples,
        temperature=config.temperature,
    )


def _check_sampling(config: CollectConfig, spec: str) -> None:
    check_sampling(spec, samples=config.samples, temperature=config.temperature)


def _name_unopened(config: CollectConfig) -> str:
    """What requests to a teacher are named by, as far as that can be told without a key and without fetching it."""
    if config.teacher.startswith(("recorded:", "openai:")):
        # Named by their content or their server, too; opening one sends nothing.
        with suppress(TeacherUnavailableError, DependencyError):
            return request_name(open_teacher(config.teacher, base_url=config.base_url))
    return config.teacher


def _require_consent(config: CollectConfig, requests: PromptRequests, ledger: Ledger, confirm: Confirm | None) -> None:
    if config.max_cost is not None or config.yes:
        return
    found = estimate(requests, teacher=config.teacher, ceiling=config.ceiling, ledger=ledger)
    expected, worst = (found.expected_batch, found.worst_batch) if config.batch else (found.expected, found.worst)
    if expected is None or worst is None or expected <= ASK_ABOVE_USD:
        return
    cost = f"{found.requests:,} requests are expected to cost ${expected:,.2f}, at the very worst ${worst:,.2f}"
    if confirm is None or not confirm(f"{cost}. Go on?"):
        raise ConfigError(
            f"{cost}; nothing was sent.",
            hint="Set a wall with --max-cost USD, or agree with --yes. What it is made of:  --dry-run",
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
