"""One story of a collection that everything goes wrong with, and what must be true at its end.

A story is a few prompts, faults for the server, and runs of the real command, each of which may be killed (`kill -9`)
at a moment of its own. Then come clean runs, until the command says that it is done. After that every prompt must
have its one answer, no answer that the ledger ever held may be gone, and the server's journal may show a request
billed more often than replies to it are kept only where the summary reports a sending that was cut off.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from mlx_distill.layout import DataFolder, read_rows
from mlx_distill.ledger import Ledger
from mlx_distill.records import ChatRow
from tests.servers.messages_server import MODEL, Fault, MessagesServer

ROOT = Path(__file__).resolve().parent.parent.parent

#: A limit on the clean runs at the end; each must bring something that the one before could not.
MOST_CLEAN_RUNS = 4

_RATE = {"status": 429, "error_type": "rate_limit_error", "message": "slow down"}

#: Name → the fault, and whether it is one of single requests, of the endpoints of batches, or both.
FAULTS: dict[str, tuple[Fault, str]] = {
    "429 with retry-after": (Fault("status", **_RATE, retry_after=0.01), "both"),  # type: ignore[arg-type]
    "429 without retry-after": (Fault("status", **_RATE), "both"),  # type: ignore[arg-type]
    "400": (Fault("status", status=400, error_type="invalid_request_error"), "both"),
    "500": (Fault("status", status=500, retry_after=0.01), "both"),
    "529": (Fault("status", status=529, error_type="overloaded_error", retry_after=0.01), "both"),
    "stall": (Fault("stall", seconds=0.15), "both"),
    "dropped before accepting": (Fault("drop before"), "both"),
    "dropped after accepting": (Fault("drop after"), "both"),
    "a page of a proxy": (Fault("text page"), "both"),
    "stream ends early": (Fault("cut stream"), "request"),
    "stream breaks": (Fault("break stream"), "request"),
    "error inside a stream": (Fault("error event"), "request"),
    "request expires": (Fault("expire"), "request"),
    "request canceled": (Fault("cancel"), "request"),
    "request errored": (Fault("error"), "request"),
    "results cut at a line": (Fault("cut at line"), "results"),
    "results cut inside a line": (Fault("cut in line"), "results"),
    "results break off": (Fault("cut short"), "results"),
    "results reordered": (Fault("reorder"), "results"),
    "results twice": (Fault("twice"), "results"),
    "results elsewhere": (Fault("elsewhere"), "retrieve"),
}

#: Endpoints of batches that a fault of kind "both" can hit.
ENDPOINTS = ("batches create", "batches list", "batches retrieve", "batches results")

#: Of the server: at which the process can be killed.
EVENTS = ("arrived", "accepted", "answering", "half answered", "answered")


@dataclass(frozen=True)
class Kill:
    """When a run is killed: at the nth event of the server from the start of the run, or after some seconds."""

    event: str | None = None
    nth: int = 1
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """For the table."""
        return f"kill -9, {self.event}" if self.event else "kill -9, at any time"


@dataclass(frozen=True)
class Run:
    """One run of the command before the clean ones; not killed where `kill` is None."""

    batch: bool
    kill: Kill | None


@dataclass(frozen=True)
class Story:
    """What happens.

    Attributes:
        words: Words that the answer to each prompt has.
        max_tokens: First limit; above 8,192 answers are streamed.
        faults: Name of a fault and where it strikes: a prompt's number, or an endpoint.
        looks: How often a batch is looked at before it has ended.
    """

    words: tuple[int, ...]
    max_tokens: int
    concurrency: int
    delay: float
    looks: int
    faults: tuple[tuple[str, int | str], ...]
    runs: tuple[Run, ...]
    last_in_batch: bool


@dataclass
class Tally:
    """What many stories came to."""

    stories: int = 0
    kills: int = 0
    tried: Counter[str] = field(default_factory=Counter)
    lost: Counter[str] = field(default_factory=Counter)
    paid_twice: Counter[str] = field(default_factory=Counter)
    reported: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        self.stories += other.stories
        self.kills += other.kills
        for name in ("tried", "lost", "paid_twice", "reported"):
            getattr(self, name).update(getattr(other, name))


class Zygote:
    """Starts the command as a process of its own, in milliseconds; see `zygote.py`."""

    def __enter__(self) -> Self:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OPENBLAS_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._read() == "ready"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def start(self, arguments: list[str], environment: dict[str, str], output: Path) -> int:
        """Start the command; returns its process id."""
        order = {"arguments": arguments, "environment": environment, "output": str(output)}
        return int(self._ask(json.dumps(order)))

    def wait(self) -> int:
        """Wait for the command to end; returns its exit code, negative for a signal."""
        return int(self._ask(""))

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def play(story: Story, zygote: Zygote) -> Tally:
    """Play a story and check its end.

    Raises:
        AssertionError: An answer was lost, a clean run did not end well, or something was paid for twice and not
            reported.
    """
    with tempfile.TemporaryDirectory() as name, MessagesServer(delay=story.delay, looks=story.looks) as server:
        return _Play(story, zygote, server, Path(name)).play()


class _Play:
    def __init__(self, story: Story, zygote: Zygote, server: MessagesServer, folder: Path) -> None:
        self.story, self.zygote, self.server, self.folder = story, zygote, server, folder
        self.tally = Tally(stories=1)
        self.out = folder / "out"
        self.known: dict[str, tuple[str, str]] = {}
        self.prompts = [f"question {n} in {words} words" for n, words in enumerate(story.words)]
        (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in self.prompts), encoding="utf-8")
        server.keep_requests = False
        server.answer = answer_to

    def play(self) -> Tally:
        planned = Counter[str]()
        for fault, place in self.story.faults:
            key = self.prompts[place] if isinstance(place, int) else place
            self.server.faults[key].append(FAULTS[fault][0])
            planned[fault] += 1
        for run in self.story.runs:
            self._run(run.batch, run.kill)
        left = Counter(
            next(name for name, (fault, _) in FAULTS.items() if fault is waiting)
            for waits in self.server.faults.values()
            for waiting in waits
        )
        self.tally.tried.update(planned - left)
        self.server.faults.clear()
        summary = self._clean_runs()
        self._check(summary)
        return self.tally

    def _run(self, batch: bool, kill: Kill | None, *further: str) -> tuple[int, str]:
        output = self.folder / "output.txt"
        arguments = [
            *("collect", "--prompts", str(self.folder / "prompts.txt"), "--out", str(self.out), "--json", "--yes"),
            *("--teacher", f"anthropic:{MODEL}", "--accept-terms", "--valid-fraction", "0", "--test-fraction", "0"),
            *("--max-tokens", str(self.story.max_tokens), "--max-tokens-ceiling", str(4 * self.story.max_tokens)),
            *("--concurrency", str(self.story.concurrency), "--duplicate-threshold", "0", "--eval-prompts", ""),
            *(("--batch",) if batch else ()),
            *further,
        ]
        output.write_text("", encoding="utf-8")
        with self._killing(kill) as begin:
            begin(self.zygote.start(arguments, self.server.environment, output))
            code = self.zygote.wait()
        if code == -signal.SIGKILL:
            assert kill is not None
            self.tally.kills += 1
            self.tally.tried[kill.name] += 1
        said = output.read_text(encoding="utf-8")
        assert "Traceback" not in said, said
        self._nothing_lost()
        return code, said

    @contextmanager
    def _killing(self, kill: Kill | None) -> Iterator[Any]:
        """Kill the process, whose id is told by calling what this yields, at the moment that `kill` says."""
        started, over = threading.Event(), threading.Event()
        lock = threading.Lock()
        seen = Counter[str]()
        process = 0

        def strike() -> None:
            started.wait(5)
            with lock, suppress(ProcessLookupError):
                if not over.is_set():
                    os.kill(process, signal.SIGKILL)

        def note(event: str) -> None:
            seen[event] += 1
            if kill is not None and event == kill.event and seen[event] == kill.nth:
                strike()

        def begin(pid: int) -> None:
            nonlocal process
            process = pid
            started.set()

        timer = threading.Timer(kill.seconds, strike) if kill is not None and kill.event is None else None
        self.server.on_event = note
        if timer is not None:
            timer.start()
        try:
            yield begin
        finally:
            with lock:
                over.set()
            self.server.on_event = lambda _event: None
            if timer is not None:
                timer.cancel()
                timer.join()

    def _nothing_lost(self) -> None:
        """Every answer that was ever in the ledger is there as it was."""
        path = DataFolder(self.out).ledger
        if not path.exists():
            return
        with Ledger(path) as ledger:
            now = {e.request.key: (e.state, e.reply.text) for e in ledger.entries() if e.reply is not None}
        lost = {key for key, answer in self.known.items() if now.get(key) != answer}
        for name in self._names():
            self.tally.lost[name] += len(lost)
        assert not lost
        self.known = now

    def _clean_runs(self) -> dict[str, Any]:
        further: tuple[str, ...] = ()
        said = ""
        for _ in range(MOST_CLEAN_RUNS):
            code, said = self._run(self.story.last_in_batch, None, *further)
            if code == 0:
                return dict(json.loads(next(line for line in said.splitlines() if line.startswith("{"))))
            # As a person would who reads what is printed.
            further = ()
            if (several := re.search(r"several that it can be: (\S+),", said)) is not None:
                further = ("--batch-orphan", f"adopt={several[1]}")
            elif "probably never accepted" in said:
                further = ("--batch-orphan", "resubmit")
        raise AssertionError(f"no end after {MOST_CLEAN_RUNS} clean runs: {said}")

    def _check(self, summary: dict[str, Any]) -> None:
        assert (summary["answered"], summary["failed"]) == (len(self.prompts), 0)
        rows = read_rows(self.out / "train.jsonl", ChatRow)
        assert [[m.content for m in row.messages] for row in rows] == [[p, answer_to(p)] for p in self.prompts]
        kept, cut = Counter[str](), Counter[str]()
        with Ledger(DataFolder(self.out).ledger) as ledger:
            for entry in ledger.entries():
                prompt = entry.request.messages[0].content or ""
                kept[prompt] += entry.reply is not None
                cut[prompt] += entry.cut
        assert summary["cut_sendings"] == sum(cut.values())
        billed = self.server.billed
        more = {prompt: billed[prompt] - kept[prompt] for prompt in self.prompts}
        unreported = sum(max(0, n - cut[prompt]) for prompt, n in more.items())
        for name in self._names():
            self.tally.paid_twice[name] += unreported
            self.tally.reported[name] += sum(max(0, n) for n in more.values())
        assert all(n >= 0 for n in more.values()), "an answer is kept that was never asked"
        assert unreported == 0, f"billed {billed}, kept {kept}, cut {cut}"

    def _names(self) -> list[str]:
        kills = {run.kill.name for run in self.story.runs if run.kill is not None}
        return sorted({fault for fault, _ in self.story.faults} | kills)


def answer_to(prompt: str) -> str:
    """The one right answer to a prompt that ends in "in N words"."""
    words = int(prompt.split()[-2])
    return " ".join([prompt.replace(" ", "-"), *(f"w{n}" for n in range(words - 1))])


def random_story(chance: random.Random, *, kills: int = 4) -> Story:
    """A story; the same for the same state of `chance`."""
    streamed = chance.random() < 0.25
    prompts = chance.randint(2, 8)
    max_tokens = 9000 if streamed else 6
    faults: list[tuple[str, int | str]] = []
    for _ in range(chance.randint(0, 5)):
        name = chance.choice(list(FAULTS))
        faults.append(
            (name, place_of(name, chance.randrange(prompts), chance.choice(ENDPOINTS), chance.random() < 0.5))
        )
    runs = tuple(Run(chance.random() < 0.5, random_kill(chance)) for _ in range(kills))
    return Story(
        words=tuple(chance.choice((1, 3, 5, 9, 20)) for _ in range(prompts)),
        max_tokens=max_tokens,
        concurrency=chance.choice((1, 2, 4, 8)),
        delay=chance.choice((0.0, 0.01, 0.03)),
        looks=chance.choice((0, 1, 3)),
        faults=tuple(faults),
        runs=runs,
        last_in_batch=chance.random() < 0.5,
    )


def random_kill(chance: random.Random) -> Kill:
    """A kill at an event of the server, mostly, or at any time."""
    if chance.random() < 0.4:
        return Kill(seconds=chance.uniform(0.0, 0.25))
    return Kill(event=chance.choice(EVENTS), nth=chance.randint(1, 5))


def place_of(name: str, prompt: int, endpoint: str, at_endpoint: bool) -> int | str:
    """Where a fault strikes: at a prompt's request, or at an endpoint."""
    kind = FAULTS[name][1]
    if kind == "results":
        return "batches results"
    if kind == "retrieve":
        return "batches retrieve"
    return endpoint if kind == "both" and at_endpoint else prompt
