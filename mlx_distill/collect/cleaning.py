"""Which finished answers are not trained on, and why: what the package `quality` finds, applied to a ledger.

Reads: the ledger and the held-out prompt files.  Writes: nothing; answers that are left out stay in the ledger.

In this order, the first reason counts: the prompt is too close to a held-out one ("contaminated"), the answer holds
something that looks like a credential ("credentials"), prompt and answer together are those of an earlier row but
for little ("duplicate"), the Python of the answer fails ("failing code"; only where it is asked for).
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from mlx_distill.collect.requests import histories
from mlx_distill.collect.splits import unfinished
from mlx_distill.config import CollectConfig
from mlx_distill.ledger import Entry, Ledger
from mlx_distill.progress import Bar, Progress
from mlx_distill.prompts import load_prompts
from mlx_distill.records import Request, VerificationSummary

T = TypeVar("T")

CONTAMINATED, CREDENTIALS, DUPLICATE, FAILING = "contaminated", "credentials", "duplicate", "failing code"

#: What `sandbox` means to the verification.
_SANDBOX = {"auto": None, "required": True, "off": False}


@dataclass(frozen=True)
class Cleaning:
    """What was found.

    Attributes:
        reasons: Key of a request → why its answer is left out.
        contaminated: Prompt id → id of the held-out prompt that it is too close to.
        credentials: Answers by the kind of credential they seem to hold.
        held_out: Files whose prompts were held against.
        verification: What running the answers' code showed; None where it was not asked for.
    """

    reasons: Mapping[str, str] = field(default_factory=dict)
    contaminated: Mapping[str, str] = field(default_factory=dict)
    credentials: Mapping[str, int] = field(default_factory=dict)
    held_out: tuple[str, ...] = ()
    verification: VerificationSummary | None = None

    def rule(self, entry: Entry) -> str | None:
        """Why an entry is left out; a rule for `write_data_set`."""
        return self.reasons.get(entry.request.key)


def clean(ledger: Ledger, requests: Sequence[Request], config: CollectConfig, progress: Progress) -> Cleaning:
    """Look through all finished answers.

    Args:
        requests: The first request of every prompt.

    Raises:
        InputError: A held-out file cannot be read.
        IsolationError, DependencyError: Answers cannot be verified as asked for.
    """
    from mlx_distill.quality.credentials import find_credentials

    reasons: dict[str, str] = {}
    kinds: Counter[str] = Counter()
    ids: dict[str, str] = {}
    for history in histories(ledger, requests, config.ceiling):
        entry = history[-1]
        if unfinished(entry) is not None or entry.reply is None:
            continue
        ids[entry.request.key] = entry.request.prompt_id
        if found := find_credentials(entry.reply.text):
            reasons[entry.request.key] = CREDENTIALS
            kinds.update(found)
    files = tuple(name.strip() for name in config.eval_prompts.split(",") if name.strip())
    contaminated = _contaminated(_Texts(ledger, list(ids), _prompt), files)
    reasons |= dict.fromkeys(contaminated, CONTAMINATED)
    reasons |= _duplicates(_Texts(ledger, [key for key in ids if key not in reasons], _row), config)
    summary = None
    if config.verify:
        summary, failing = _verify(
            _Texts(ledger, [key for key in ids if key not in reasons], _answer), config, progress
        )
        if not config.keep_failing:
            reasons |= dict.fromkeys(failing, FAILING)
        summary = summary.model_copy(update={"failing": tuple(ids[key] for key in failing)})
    return Cleaning(
        reasons=reasons,
        contaminated={ids[key]: held_out for key, held_out in contaminated.items()},
        credentials=dict(sorted(kinds.items())),
        held_out=files,
        verification=summary,
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

    held_out = {prompt.id: prompt.text for name in files for prompt in load_prompts(Path(name))}
    return contaminated(prompts, held_out) if held_out and prompts else {}


def _duplicates(rows: Mapping[str, str], config: CollectConfig) -> dict[str, str]:
    if not config.duplicate_threshold:
        return {}
    from mlx_distill.quality.duplicates import near_duplicates

    return dict.fromkeys(near_duplicates(rows, threshold=config.duplicate_threshold), DUPLICATE)


def _verify(
    answers: Mapping[str, str], config: CollectConfig, progress: Progress
) -> tuple[VerificationSummary, list[str]]:
    from mlx_distill.quality.verify import verify_answers

    found = verify_answers(answers, sandbox=_SANDBOX[config.sandbox], progress=progress)
    outcomes = Counter(verification.passed for verification in found.values())
    levels = {verification.isolation for verification in found.values() if verification.isolation}
    summary = VerificationSummary(
        passed=outcomes[True],
        failed=outcomes[False],
        without_code=outcomes[None],
        tests=sum(verification.tests for verification in found.values()),
        isolation=", ".join(sorted(levels)) or None,
    )
    return summary, [key for key, verification in found.items() if verification.passed is False]


def _prompt(entry: Entry) -> str:
    return "\n\n".join(message.content or "" for message in entry.request.messages)


def _answer(entry: Entry) -> str:
    return entry.reply.text if entry.reply is not None else ""


def _row(entry: Entry) -> str:
    return f"{_prompt(entry)}\n\n{_answer(entry)}"


class _Texts(Mapping[str, str]):
    """Texts by key, read from the ledger when they are looked at: there may be more than memory holds."""

    def __init__(self, ledger: Ledger, keys: Sequence[str], text: Callable[[Entry], str]) -> None:
        self._ledger = ledger
        self._keys = keys
        self._text = text

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __getitem__(self, key: str) -> str:
        entry = self._ledger.entry(key)
        if entry is None:
            raise KeyError(key)
        return self._text(entry)


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
