"""The runs under a folder, whatever their state, with what one compares two trainings by.

A listing must show what is there: a record that lacks fields, as one of an older version does, is read as far as it
goes, and one that cannot be read is named with the reason, beside the others.

Reads: FOLDER/**/{run.json,metrics.jsonl,.lock}.  Writes: nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from mlx_distill import layout, locks
from mlx_distill.distillation import Objective
from mlx_distill.errors import InputError
from mlx_distill.records import Record
from mlx_distill.run_course import read_course

#: Levels of folders that are looked through: FOLDER/RUN and FOLDER/GROUP/RUN.
DEPTH = 2

Status = Literal["finished", "training", "stopped", "starting", "damaged"]
Order = Literal["created", "loss", "divergence", "accuracy", "time"]


class RunEntry(Record):
    """A run as it is listed. What is not known, or not yet, is None.

    Attributes:
        name: Path of the run below the folder that was listed; the folder's own name where it is itself a run.
        status: "training" and "starting" while a process holds the run; "stopped" where none does and the run is not
            finished, so that its command would go on with it.
        problem: Why it is damaged.
        process: That holds the run.
        step: Optimizer steps taken.
        planned_steps: That it takes unless it stops early.
        stopped_early: Whether it ended before those, as the validation loss no longer fell or as that was asked for.
        epochs: Passes over the rows so far, fractional while it trains.
        rows: Training rows.
        tokens: Of those rows.
        first_valid_loss: Before the first step, in nats a token.
        valid_loss: Of the best adapter, in nats a token.
        first_divergence, divergence: From the teacher whose distribution is learned, likewise.
        token_accuracy: At the lowest validation loss, 0 to 1.
        tokens_per_second: Real tokens trained on a second, evaluation not counted.
        seconds: Time that the run took so far.
        created: Its beginning, as ISO 8601.
        settings: The configuration as used, without the folder of the run.
        data_sha256: Of each split.
        model_revision: Of the base model.
    """

    name: str
    folder: str
    status: Status
    problem: str | None = None
    process: int | None = None
    step: int | None = None
    planned_steps: int | None = None
    stopped_early: bool = False
    model: str | None = None
    model_revision: str | None = None
    rows: int | None = None
    tokens: int | None = None
    epochs: float | None = None
    planned_epochs: int | None = None
    rank: int | None = None
    layers: int | str | None = None
    learning_rate: float | None = None
    first_valid_loss: float | None = None
    valid_loss: float | None = None
    first_divergence: float | None = None
    divergence: float | None = None
    token_accuracy: float | None = None
    test_loss: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    seconds: float | None = None
    created: str | None = None
    version: str | None = None
    device: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    data_sha256: dict[str, str] = Field(default_factory=dict)

    @property
    def began(self) -> datetime | None:
        """`created` in this machine's time; None where it says no time."""
        try:
            return datetime.fromisoformat(self.created or "").astimezone()
        except (ValueError, OverflowError, OSError):
            return None


class _Facts(BaseModel):
    """Part of a record, of whichever version: what is not known is left out, and nothing is required."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class _ModelFacts(_Facts):
    name: str | None = None
    revision: str | None = None


class _SplitFacts(_Facts):
    rows: int | None = None
    tokens: int | None = None
    sha256: str | None = None


class _RunFacts(_Facts):
    format: Literal[1] = 1
    status: Literal["running", "finished"]
    created: str | None = None
    version: str | None = None
    device: str | None = None
    model: _ModelFacts = _ModelFacts()
    config: dict[str, JsonValue] = {}
    splits: dict[str, _SplitFacts] = {}
    epochs: int | None = None
    steps: int | None = None
    stopped_early: bool = False
    cut_short: bool = False
    first_valid_loss: float | None = None
    valid_loss: float | None = None
    first_divergence: float | None = None
    divergence: float | None = None
    test_loss: float | None = None
    token_accuracy: float | None = None
    tokens_per_second: float | None = None
    peak_memory_bytes: int | None = None
    seconds: float | None = None


def list_runs(folder: Path, *, order: Order = "created") -> list[RunEntry]:
    """The runs in a folder and in the folders right below it; or the folder alone, where it is itself a run.

    Args:
        order: "created", the newest first; "loss", "divergence" or "accuracy", the best first; "time", the shortest
            first. Runs of which that is not known come after the others, and damaged ones last.

    Raises:
        InputError: There is no such folder, or it cannot be read.
    """
    try:
        next(folder.iterdir(), None)
    except FileNotFoundError:
        raise InputError("no such folder.", path=folder) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}.", path=folder) from None
    own = _entry(folder, folder.resolve().name)
    found = [own] if own else _below(folder, "", DEPTH)
    return sorted(found, key=lambda entry: _sort_key(entry, order))


def settings_that_differ(entries: Iterable[RunEntry]) -> dict[str, dict[str, Any]]:
    """What the runs were not all made with alike: setting → name of the run → value.

    A run that does not state a setting, as one of an older version, has no value there, and makes no difference alone.
    Data sets are told apart by their content, models by their revision: a folder's name may stand for either.
    """
    stated: dict[str, dict[str, Any]] = {}
    identities: dict[str, set[str]] = {}
    for entry in entries:
        for key, identity, shown in _stated(entry):
            stated.setdefault(key, {})[entry.name] = shown
            identities.setdefault(key, set()).add(identity)
    return {key: values for key, values in stated.items() if len(identities[key]) > 1}


def comparable(entries: Iterable[RunEntry]) -> bool:
    """Whether the losses of runs may be held against each other, as far as is known: the same rows, the same model."""
    validated = [entry for entry in entries if entry.valid_loss is not None]
    rows = {entry.data_sha256.get("valid") for entry in validated} - {None}
    models = {entry.model for entry in validated} - {None}
    return len(rows) <= 1 and len(models) <= 1


def _below(folder: Path, prefix: str, depth: int) -> list[RunEntry]:
    try:
        children = sorted(path for path in folder.iterdir() if not path.name.startswith(".") and path.is_dir())
    except OSError:
        return []
    found = []
    for child in children:
        entry = _entry(child, prefix + child.name)
        if entry is not None:
            found.append(entry)
        elif depth > 1:
            found += _below(child, f"{prefix}{child.name}/", depth - 1)
    return found


def _entry(root: Path, name: str) -> RunEntry | None:
    """What a folder holds of a run; None where it is none."""
    folder = layout.RunFolder(root)
    base = RunEntry(name=name, folder=str(root), status="damaged")
    try:
        if not folder.record.exists():
            if folder.adapter.exists():
                return base.model_copy(update={"problem": "its adapter is there, but no run.json that describes it."})
            return _starting(base, root)
        content = folder.record.read_bytes()
        facts = _RunFacts.model_validate_json(content)
        has_adapter = folder.adapter.exists()
    except ValidationError as error:
        return base.model_copy(update={"problem": f"run.json: {layout.explain(error)}."})
    except OSError as error:
        return base.model_copy(update={"problem": f"run.json cannot be read: {error.strerror}."})
    entry = _described(base, facts)
    if facts.status == "running":
        return _under_way(entry, folder)
    if not has_adapter:
        return entry.model_copy(update={"problem": "run.json says that it is finished, but its adapter is missing."})
    return entry.model_copy(
        update={
            "status": "finished",
            "step": facts.steps,
            "stopped_early": facts.stopped_early or facts.cut_short,
            "epochs": facts.epochs,
            "valid_loss": facts.valid_loss,
            "first_valid_loss": facts.first_valid_loss,
            "first_divergence": facts.first_divergence,
            "divergence": facts.divergence,
            "token_accuracy": facts.token_accuracy,
            "test_loss": facts.test_loss,
            "tokens_per_second": facts.tokens_per_second,
            "peak_memory_bytes": facts.peak_memory_bytes,
            "seconds": facts.seconds,
        }
    )


def _starting(base: RunEntry, root: Path) -> RunEntry | None:
    """A folder in which there is nothing yet, held by a process that loads a model, is a run that starts."""
    process = locks.holder(root)
    if process is None or any(not path.name.startswith(".") for path in root.iterdir()):
        return None
    return base.model_copy(update={"status": "starting", "process": process})


def _described(base: RunEntry, facts: _RunFacts) -> RunEntry:
    """What the record of a run says whether it is finished or not."""
    settings = {key: _plain(value) for key, value in facts.config.items() if key != "run"}
    train = facts.splits.get("train", _SplitFacts())
    epochs, batch_size = settings.get("epochs"), settings.get("batch_size")
    planned = None
    if isinstance(epochs, int) and isinstance(batch_size, int) and batch_size > 0 and train.rows is not None:
        planned = epochs * math.ceil(train.rows / batch_size)
    return base.model_copy(
        update={
            "planned_steps": planned,
            "planned_epochs": _of_type(epochs, int),
            "model": facts.model.name,
            "model_revision": facts.model.revision,
            "rows": train.rows,
            "tokens": train.tokens,
            "rank": _of_type(settings.get("rank"), int),
            "layers": _of_type(settings.get("layers"), int, str),
            "learning_rate": _of_type(settings.get("learning_rate"), int, float),
            "created": facts.created,
            "version": facts.version,
            "device": facts.device or None,
            "settings": settings,
            "data_sha256": {split: summary.sha256 for split, summary in facts.splits.items() if summary.sha256},
        }
    )


def _objective(settings: Mapping[str, Any]) -> Objective | None:
    """What a run minimises; None where that is the loss of the text, or is not known."""
    kind, weight = settings.get("distill", "off"), settings.get("distill_weight")
    return None if kind == "off" or not isinstance(weight, int | float) else Objective(kind, float(weight))


def _under_way(entry: RunEntry, folder: layout.RunFolder) -> RunEntry:
    process = locks.holder(folder.root)
    course = read_course(folder.metrics, _objective(entry.settings))
    last, first, best = course.last, course.first_valid, course.best_valid
    return entry.model_copy(
        update={
            "status": "stopped" if process is None else "training",
            "process": process,
            "step": last.step if last else 0,
            "epochs": last.epoch if last else 0,
            "first_valid_loss": first.loss if first else None,
            "valid_loss": best.loss if best else None,
            "first_divergence": first.divergence if first else None,
            "divergence": best.divergence if best else None,
            "token_accuracy": best.token_accuracy if best else None,
            "tokens_per_second": course.tokens_per_second,
            "seconds": last.seconds if last else None,
        }
    )


def _of_type(value: object, *kinds: type) -> Any:
    return value if isinstance(value, kinds) and not isinstance(value, bool) else None


def _plain(value: JsonValue) -> JsonValue:
    """What JSON has no number for, as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _stated(entry: RunEntry) -> Iterator[tuple[str, str, Any]]:
    """Each setting that a run states: (key, what it is told apart by, what is shown)."""
    if entry.status == "damaged":
        return
    for key, value in entry.settings.items():
        if key not in ("data", "model"):
            whole = int(value) if isinstance(value, float) and value.is_integer() else value
            yield key, json.dumps(whole, sort_keys=True), value
    for split, sha256 in entry.data_sha256.items():
        yield f"{split} rows", sha256, f"{entry.settings.get('data', '')} ({sha256[:8]})".lstrip()
    if entry.model is not None:
        revision = entry.model_revision or ""
        yield "model", f"{entry.model} {revision}", f"{entry.model} ({revision[:8]})" if revision else entry.model
    for key, text in (("device", entry.device), ("mlx-distill", entry.version)):
        if text is not None:
            yield key, text, text


def _sort_key(entry: RunEntry, order: Order) -> tuple[bool, bool, float, str]:
    began = entry.began
    value = {
        "created": None if began is None else -began.timestamp(),
        "loss": entry.valid_loss,
        "divergence": entry.divergence,
        "accuracy": None if entry.token_accuracy is None else -entry.token_accuracy,
        "time": entry.seconds,
    }[order]
    return entry.status == "damaged", value is None, value or 0.0, entry.name
