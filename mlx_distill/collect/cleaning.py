"""Which finished answers are not trained on, and why: what the package `quality` finds, applied to a ledger.

Reads: the ledger and the held-out prompt files.  Writes: nothing; answers that are left out stay in the ledger.

In this order, the first reason counts: the prompt is too close to a held-out one ("contaminated"), the answer holds
something that looks like a credential ("credentials"), its code fails ("failing code", "failing tests"; only where it
is asked for), another answer to the prompt is chosen ("not chosen"), prompt and answer together are those of an earlier
row but for little ("duplicate"). Duplicates come last: what is left out itself takes no other answer's place.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mlx_distill.collect.choosing import Candidate, Choice, Scorer, choose, judge_spent
from mlx_distill.collect.reading import FromLedger, prompt, row
from mlx_distill.collect.requests import histories
from mlx_distill.collect.splits import unfinished
from mlx_distill.collect.verifying import verify
from mlx_distill.config import CollectConfig
from mlx_distill.evaluation.tasks import BUILTIN, as_prompts, load_tasks, read_prompts
from mlx_distill.ledger import Entry, Ledger
from mlx_distill.manifest import VerificationSummary
from mlx_distill.progress import Bar, Progress
from mlx_distill.records import Prompt, Request

T = TypeVar("T")

CONTAMINATED, CREDENTIALS, DUPLICATE = "contaminated", "credentials", "duplicate"


@dataclass(frozen=True)
class Cleaning:
    """What was found.

    Attributes:
        reasons: Key of a request → why its answer is left out.
        facts: Fields of the manifest.
    """

    reasons: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def rule(self, entry: Entry) -> str | None:
        """Why an entry is left out; a rule for `write_data_set`."""
        return self.reasons.get(entry.request.key)


async def clean(
    ledger: Ledger,
    requests: Sequence[Request],
    config: CollectConfig,
    progress: Progress,
    scorer: Scorer | None = None,
) -> Cleaning:
    """Look through all finished answers.

    Args:
        requests: The first request of every sample of every prompt.
        scorer: Says which answers are best, where these are chosen.

    Raises:
        InputError: A held-out file cannot be read.
        IsolationError, DependencyError: Answers cannot be verified as asked for.
        TeacherError: As `choose`.
        asyncio.CancelledError: Cancelled; programs under way were waited for.
    """
    sifted = await in_thread(lambda told: _sift(ledger, requests, config, told), progress)
    choice = await choose(sifted.left, config, ledger, scorer, progress)
    rows = [one.key for one in sifted.left if one.key not in choice.reasons]
    duplicates = await in_thread(lambda _told: _duplicates(FromLedger(ledger, rows, row), config), progress)
    return Cleaning({**sifted.reasons, **choice.reasons, **duplicates}, _facts(sifted, choice, ledger))


@dataclass(frozen=True)
class _Sifted:
    """What is left of the finished answers before any is chosen, and what was found on the way.

    Attributes:
        reasons: By key, of those that are not left.
        contaminated: Prompt id → id of the held-out prompt that it is too close to.
        credentials: Answers by the kind of credential they seem to hold.
        held_out: Files whose prompts were held against.
        none_left: As `Manifest.none_left`.
    """

    left: tuple[Candidate, ...]
    reasons: Mapping[str, str]
    contaminated: Mapping[str, str]
    credentials: Mapping[str, int]
    held_out: tuple[str, ...]
    verification: VerificationSummary | None
    none_left: tuple[str, ...]


def _facts(sifted: _Sifted, choice: Choice, ledger: Ledger) -> dict[str, Any]:
    return {
        "held_out": sifted.held_out,
        "contaminated": dict(sifted.contaminated),
        "credentials": dict(sifted.credentials),
        "verification": sifted.verification,
        "chosen_by": choice.by,
        "unscored": choice.unscored,
        "judge_usd": judge_spent(ledger).most,
        "none_left": sifted.none_left,
    }


def _sift(ledger: Ledger, requests: Sequence[Request], config: CollectConfig, progress: Progress) -> _Sifted:
    from mlx_distill.quality.credentials import find_credentials

    reasons: dict[str, str] = {}
    kinds: Counter[str] = Counter()
    found: dict[str, Candidate] = {}
    for history in histories(ledger, requests, config.ceiling):
        entry = history[-1]
        if unfinished(entry) is not None or entry.reply is None:
            continue
        request, text = entry.request, entry.reply.text
        found[request.key] = Candidate(request.key, request.prompt_id, request.sample, len(text))
        if held := find_credentials(text):
            reasons[request.key] = CREDENTIALS
            kinds.update(held)
    files = tuple(name.strip() for name in config.eval_prompts.split(",") if name.strip())
    contaminated = _contaminated(FromLedger(ledger, list(found), prompt), files)
    reasons |= dict.fromkeys(contaminated, CONTAMINATED)
    summary = None
    if config.verify:
        summary, failing = verify(ledger, [key for key in found if key not in reasons], config, progress)
        reasons |= {} if config.keep_failing else failing
    left = tuple(one for key, one in found.items() if key not in reasons)
    with_answer = {one.prompt_id for one in left}
    own = dict.fromkeys(one.prompt_id for key, one in found.items() if key not in contaminated)
    return _Sifted(
        left=left,
        reasons=reasons,
        contaminated={found[key].prompt_id: held_out for key, held_out in contaminated.items()},
        credentials=dict(sorted(kinds.items())),
        held_out=files,
        verification=summary,
        none_left=tuple(name for name in own if name not in with_answer),
    )


async def in_thread(work: Callable[[Progress], T], progress: Progress) -> T:
    """Do long work beside the event loop. A cancellation stops it where it next reports its progress."""
    stop = threading.Event()
    task = asyncio.get_running_loop().run_in_executor(None, work, _Stoppable(progress, stop))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        stop.set()
        with suppress(_StoppedError):
            await task
        raise


def _contaminated(prompts: Mapping[str, str], files: Sequence[str]) -> dict[str, str]:
    from mlx_distill.quality.contamination import contaminated

    held_out = {one.id: one.text for name in files for one in _held_out(name)}
    return contaminated(prompts, held_out) if held_out and prompts else {}


def _held_out(name: str) -> Iterable[Prompt]:
    return as_prompts(load_tasks()) if name == BUILTIN else read_prompts(Path(name))


def _duplicates(rows: Mapping[str, str], config: CollectConfig) -> dict[str, str]:
    if not config.duplicate_threshold:
        return {}
    from mlx_distill.quality.duplicates import near_duplicates

    return dict.fromkeys(near_duplicates(rows, threshold=config.duplicate_threshold), DUPLICATE)


class _StoppedError(Exception):
    """The work was stopped where it reported its progress."""


class _Stoppable(Progress):
    def __init__(self, inner: Progress, stop: threading.Event) -> None:
        self._inner = inner
        self._stop = stop

    @contextmanager
    def task(self, title: str, total: float | None = None, *, unit: str = "") -> Iterator[Bar]:
        with self._inner.task(title, total, unit=unit) as bar:
            yield _StoppableBar(bar, self._stop)

    def say(self, line: str) -> None:
        self._inner.say(line)


class _StoppableBar(Bar):
    def __init__(self, inner: Bar, stop: threading.Event) -> None:
        self._inner = inner
        self._stop = stop

    def advance(self, amount: float = 1, **fields: str) -> None:
        if self._stop.is_set():
            raise _StoppedError
        self._inner.advance(amount, **fields)
