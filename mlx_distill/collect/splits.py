"""From ledger to data set: which answers are trained on, and in which split each prompt family lies.

Reads: the ledger.  Writes: `train.jsonl`, `valid.jsonl`, `test.jsonl`, then `manifest.json`.

A split is decided by the family's name alone: a hash of the name, read as a number from 0 to 1, lies below
`test_fraction` (test), below that plus `valid_fraction` (valid), or above (train). So variations of one prompt stay
together, and adding or removing prompts never moves another family. The price is that fractions are met only on
average: with few families a split can be empty. No family is then moved to fill it, since a prompt added later
would move it back; the split's file is left out, and the summary says so.

Only finished answers with text are rows; all others are counted in the manifest by reason. The files are replaced one
after another and the manifest, which holds their hashes, comes last: a crash in between leaves a manifest that does
not match, and the next collection, which asks nothing again, mends it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from mlx_distill.collect.requests import histories, samples_in
from mlx_distill.errors import ConfigError, FolderError, InputError, TeacherError
from mlx_distill.layout import DataFolder, atomic_file, explain, file_sha256, read_record, write_text
from mlx_distill.ledger import Entry, Ledger
from mlx_distill.manifest import DropCount, Manifest, TeacherTerms
from mlx_distill.records import ChatRow, Message, Request, Split, Usage

SPLITS: tuple[Split, ...] = get_args(Split)

#: Hashed before a family's name. The first of "split-0:", "split-1:", … that gives the prompts which ship with the
#: package three families each in valid and test. Another prefix would reshuffle every data set.
_SPLIT_PREFIX = "split-1:"

#: Reasons of what may still come: the prompt was not sent yet, or is under way in a batch.
UNSENT, IN_BATCH = "unsent", "in a batch"

#: Says why an entry is not trained on, or None.
DropRule = Callable[[Entry], str | None]


def split_of(family: str, *, valid_fraction: float, test_fraction: float) -> Split:
    """The split of a family, whatever else is in the data set."""
    digest = hashlib.sha256(f"{_SPLIT_PREFIX}{family}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64
    if place < test_fraction:
        return "test"
    return "valid" if place < test_fraction + valid_fraction else "train"


def unfinished(entry: Entry) -> str | None:
    """Drops what is not a whole answer: "unsent", "in a batch", "failed", "refused", "truncated" or "empty"."""
    if entry.state != "answered":
        if entry.state in ("refused", "truncated"):
            return entry.state
        if entry.state == "planned":
            return UNSENT
        return IN_BATCH if entry.state == "sent" and entry.batch is not None else "failed"
    return None if entry.reply is not None and entry.reply.text.strip() else "empty"


def chat_row(entry: Entry) -> ChatRow:
    """The row of an answered request: system text, if any, the conversation, and the answer as the last turn."""
    assert entry.reply is not None
    system = [Message(role="system", content=entry.request.system)] if entry.request.system else []
    answer = Message(role="assistant", content=entry.reply.text)
    return ChatRow(messages=(*system, *entry.request.messages, answer))


@dataclass
class _Tally:
    """What went by while the rows were written."""

    rows: dict[Split, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 0))
    families: dict[Split, set[str]] = field(default_factory=lambda: {split: set() for split in SPLITS})
    dropped: dict[str, list[str]] = field(default_factory=dict)
    models: dict[str, None] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    answered: int = 0
    asked_again: int = 0
    batch_answers: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost_usd: float = 0.0
    cut_sendings: int = 0
    cut_usd: float = 0.0
    prices_dated: str | None = None
    seconds: float = 0.0

    def count(self, history: Sequence[Entry]) -> Entry:
        """Count what was asked for one sample; returns the entry that decides."""
        for entry in history:
            self._count(entry)
        last = history[-1]
        self.asked_again += sum(entry.attempts > 0 for entry in history[1:])
        self.answered += last.state == "answered"
        if last.state == "refused" and last.reply is not None:
            category = last.reply.category or "none given"
            self.refusals[category] = self.refusals.get(category, 0) + 1
        return last

    def _count(self, entry: Entry) -> None:
        self.cut_sendings += entry.cut
        self.cut_usd += entry.cut_usd
        if entry.reply is None:
            return
        self.models[entry.reply.model] = None
        self.batch_answers += entry.batch is not None
        self.input_tokens += entry.reply.usage.input_tokens
        self.output_tokens += entry.reply.usage.output_tokens
        self.cost_usd += entry.cost_usd or 0.0
        self.prices_dated = max(self.prices_dated or "", entry.prices_dated or "") or None
        self.seconds += entry.reply.seconds

    @property
    def waits(self) -> bool:
        """Whether more answers may come without anything having failed."""
        return UNSENT in self.dropped or IN_BATCH in self.dropped


class _NothingYet(Exception):  # noqa: N818 (it is no error)
    """There is nothing to train on, and more is to come."""


def write_data_set(
    folder: DataFolder,
    ledger: Ledger,
    requests: Sequence[Request],
    *,
    teacher: str,
    terms: TeacherTerms,
    valid_fraction: float,
    test_fraction: float,
    ceiling: int | None = None,
    rules: Sequence[DropRule] = (),
    facts: Mapping[str, Any] | None = None,
) -> Manifest:
    """Make the data set of these requests; others in the ledger are left alone.

    Args:
        requests: As `PromptRequests` has them, in the order the rows shall have.
        teacher: Spec for the manifest.
        ceiling: Highest token limit that a cut answer was asked again with; None for the first limit alone.
        rules: The first that gives a reason drops a finished answer.
        facts: Further fields of the manifest.

    Returns:
        What `manifest.json` holds. It is left as it was, date included, where nothing has changed. Where nothing can
        be trained on yet, and answers are still to come, nothing is written, and the manifest has no rows.

    Raises:
        TeacherError: No answer can be trained on. Nothing is written.
        ConfigError: All answers lie in valid and test. Nothing is written.
    """
    tally = _Tally()
    first = requests[0].max_tokens if requests else 1
    samples = samples_in(requests)

    def manifest(sha256: dict[str, str]) -> Manifest:
        return Manifest(
            name=folder.root.resolve().name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            teacher=teacher,
            teacher_models=tuple(tally.models),
            terms=terms,
            prompts=len(requests) // samples,
            samples=samples,
            temperature=requests[0].temperature if requests else None,
            answered=tally.answered,
            rows=dict(tally.rows) if sha256 else dict.fromkeys(SPLITS, 0),
            families={split: len(families) for split, families in tally.families.items()},
            sha256=sha256,
            dropped=tuple(
                DropCount(reason=reason, count=len(ids), prompt_ids=tuple(dict.fromkeys(ids)))
                for reason, ids in sorted(tally.dropped.items())
            ),
            usage=Usage(input_tokens=tally.input_tokens, output_tokens=tally.output_tokens),
            cost_usd=tally.cost_usd,
            prices_dated=tally.prices_dated,
            collection_seconds=tally.seconds,
            max_tokens=first,
            max_tokens_ceiling=ceiling or first,
            asked_again=tally.asked_again,
            batch_answers=tally.batch_answers,
            refusals=tally.refusals,
            unsent=len(tally.dropped.get(UNSENT, ())),
            in_batch=len(tally.dropped.get(IN_BATCH, ())),
            cut_sendings=tally.cut_sendings,
            cut_usd=tally.cut_usd,
            **(facts or {}),
        )

    try:
        with ExitStack() as stack:
            temporary = {split: stack.enter_context(atomic_file(folder.split(split))) for split in SPLITS}
            _write_rows(
                temporary,
                histories(ledger, requests, ceiling or first),
                tally,
                valid_fraction,
                test_fraction,
                (unfinished, *rules),
            )
            _refuse_hopeless(tally, manifest({}))
            for split, path in temporary.items():
                _read_back(path, tally.rows[split])
    except _NothingYet:
        return manifest({})
    for split in SPLITS:
        # mlx-lm takes a missing file for an empty split, and stumbles over an empty file.
        if not tally.rows[split]:
            folder.split(split).unlink(missing_ok=True)
    return _keep_or_write(
        folder, manifest({split: file_sha256(folder.split(split)) for split in SPLITS if tally.rows[split]})
    )


def _write_rows(
    paths: dict[Split, Path],
    found: Iterable[Sequence[Entry]],
    tally: _Tally,
    valid_fraction: float,
    test_fraction: float,
    rules: Sequence[DropRule],
) -> None:
    with ExitStack() as writing:
        files = {
            split: writing.enter_context(path.open("w", encoding="utf-8", newline="\n"))
            for split, path in paths.items()
        }
        for history in found:
            entry = tally.count(history)
            if (reason := _dropped(entry, rules)) is not None:
                tally.dropped.setdefault(reason, []).append(entry.request.prompt_id)
                continue
            family = entry.request.family
            split = split_of(family, valid_fraction=valid_fraction, test_fraction=test_fraction)
            files[split].write(chat_row(entry).to_json() + "\n")
            tally.rows[split] += 1
            tally.families[split].add(family)


def refuse_foreign(folder: DataFolder) -> None:
    """Refuse a folder whose splits were not made by a collection: they would be overwritten.

    Raises:
        FolderError: It has rows, but neither a ledger nor a manifest.
    """
    if not folder.ledger.exists() and not folder.manifest.exists():
        for split in SPLITS:
            if folder.split(split).exists():
                raise FolderError(
                    f"{folder.root} holds {folder.split(split).name}, which no collection made.",
                    hint="Choose another --out folder.",
                )


def _dropped(entry: Entry, rules: Sequence[DropRule]) -> str | None:
    return next(filter(None, (rule(entry) for rule in rules)), None)


def _refuse_hopeless(tally: _Tally, manifest: Manifest) -> None:
    if not tally.rows["train"] and tally.waits:
        raise _NothingYet
    if not any(tally.rows.values()):
        reasons = ", ".join(f"{len(ids)} {reason}" for reason, ids in sorted(tally.dropped.items()))
        hint = "The same command asks those that failed again; all else is kept in the ledger."
        if "truncated" in tally.dropped:
            hint = "Raise --max-tokens-ceiling: answers were cut by it."
        elif any(reason.startswith("failing") for reason in tally.dropped):
            hint = "Ask for more --samples, or train on what fails, too:  --keep-failing"
        raise TeacherError(
            f"no data set: of {manifest.asked} {manifest.unit} none has an answer to train on ({reasons}).", hint=hint
        )
    if not tally.rows["train"]:
        raise ConfigError(
            f"no data set: all {sum(tally.rows.values())} answers fall into valid and test, none into train.",
            hint="Give more prompts, or --valid-fraction 0 --test-fraction 0. The answers are kept.",
        )


def _read_back(path: Path, expected: int) -> None:
    """Check what was written, line by line, before it takes the place of what was there."""
    found = 0
    with path.open(encoding="utf-8", newline="\n") as file:
        for found, line in enumerate(file, start=1):
            try:
                ChatRow.model_validate_json(line)
            except ValidationError as error:
                raise InputError(f"{explain(error)}; is the disk sound?", path=path, line=found) from None
    if found != expected:
        raise InputError(f"{expected} rows were written and {found} read back; is the disk sound?", path=path)


def _keep_or_write(folder: DataFolder, manifest: Manifest) -> Manifest:
    try:
        known = read_record(folder.manifest, Manifest)
    except InputError:
        known = None  # There is none yet, or not one that this version can read: it is replaced.
    if known is not None and known.model_copy(update={"created": manifest.created}) == manifest:
        return known
    write_text(folder.manifest, manifest.model_dump_json(indent=2, exclude_none=True) + "\n")
    return manifest
