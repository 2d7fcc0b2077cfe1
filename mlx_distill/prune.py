"""The step `prune`: a smaller student of the same family, made by taking layers out of a model.

Reads: the model, and some rows of data/NAME/{train,valid,test}.jsonl or the starter answers.
Writes: OUT/, a whole model in Hugging Face layout, with mlx_distill_pruned.json; nothing else but the cache of tokens.

Which layers go is measured, see `backends.mlx.pruning`. The model that was written is loaded again and must have the
loss that was measured, or it is not kept. It says less than the whole one until it is trained: distil into it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from mlx_distill import layout
from mlx_distill.agreement import ProbeRow
from mlx_distill.batches import TokenRow
from mlx_distill.config import PruneConfig
from mlx_distill.dataset import tokenise_split
from mlx_distill.errors import ConfigError, FolderError, InputError, ModelError
from mlx_distill.models.folder import companions, context_length
from mlx_distill.models.resolve import resolve
from mlx_distill.models.tokenizer import load_tokenizer, require_chat_template
from mlx_distill.progress import SILENT, Progress
from mlx_distill.records import ChatRow, Message, ModelRecord, Record, Split
from mlx_distill.rows import MAKE_ONE, Row
from mlx_distill.runs import require_own_folder
from mlx_distill.teachers.recorded import recordings
from mlx_distill.tokenising import tokenise_rows

T = TypeVar("T")

#: Raised when a change makes the same model lose other layers, or gives another record of it.
CODE_FORMAT = 1

#: Tokens of a row that are read: the cost of each candidate grows with them.
MAX_TOKENS = 512

#: Rows are cut to MAX_TOKENS after they were tokenised, whatever their length.
_ANY_LENGTH = 2**31 - 1

#: To choose by a row is to learn from it, so that what is held out comes last.
_PREFERRED: tuple[Split, ...] = ("train", "valid", "test")

RowSource = Split | Literal["starter"]


class Removal(Record):
    """A layer that was taken out.

    Attributes:
        layer: Its number in the model that it was taken from, from 0.
        loss: Mean loss without it and those before it, in nats a token.
    """

    layer: int
    loss: float


class PrunedRecord(Record):
    """`mlx_distill_pruned.json`, beside the weights: what the model was made from.

    Attributes:
        code: `CODE_FORMAT` of what made it.
        model: What it was made from, as the user named it.
        revision: Commit of the Hub, or hash of the source file.
        layers: How many that model has.
        kept: Those that are left, by their number there, from the lowest.
        removed: The others, in the order in which they went.
        loss: Mean loss of the whole model, in nats a token.
        source: The split that was read, or "starter": the answers that ship with mlx-distill.
        rows: That were read.
        tokens: That carry loss, in all of them.
        bytes: Size of the weights.
    """

    format: Literal[1] = 1
    code: int
    model: str
    source_kind: Literal["folder", "hub", "gguf", "bundled"]
    revision: str | None = None
    licence: str | None = None
    layers: int
    kept: tuple[int, ...]
    removed: tuple[Removal, ...]
    loss: float
    source: RowSource
    rows: int
    tokens: int
    bytes: int


def prune(config: PruneConfig, progress: Progress = SILENT) -> PrunedRecord:
    """Write a model with fewer layers: those whose removal raises the loss most are kept.

    Raises:
        ConfigError: The model has no more layers than are to be kept.
        InputError: There are no rows to measure on.
        FolderError: The target holds something that is not a pruned model of ours, or the model itself.
        ModelError: The model is missing, or its layers cannot be taken out; says why.
        ResourceError: Not enough disk or memory. What was at the target before is there still.
    """
    from mlx_distill.backends.mlx.pruning import measure, require_prunable, require_same, write_layers

    require_own_folder(config.out, layout.pruned_record(config.out), "a pruned model")
    model = resolve(config.model, progress=progress)
    folder = Path(model.path)
    if folder.resolve().is_relative_to(config.out.resolve()):
        raise FolderError(f"{config.out} holds {config.model}, which it would replace.", hint="Choose another --out.")
    prunable = require_prunable(folder)
    _require_fewer(config, prunable.layers)
    layout.require_disk(config.out.parent, prunable.bytes_with(config.keep_layers), what="The pruned model")
    source, rows = _read_rows(config, folder)
    rounds = prunable.layers - config.keep_layers
    with progress.task(f"Taking layers out of {model.name}", total=rounds * len(rows), unit="rows") as bar:
        found = measure(folder, rows, config.keep_layers, bar.advance)
    with layout.atomic_folder(config.out) as temporary:
        with progress.task(f"Writing {len(found.kept)} layers"):
            write_layers(folder, found.kept, temporary)
            _check(require_same, temporary, rows, found.loss_after, config)
        for file in companions(folder):
            shutil.copyfile(file, temporary / file.name)
        record = PrunedRecord(
            code=CODE_FORMAT,
            model=model.spec,
            source_kind=model.source,
            revision=model.revision,
            licence=model.licence,
            layers=prunable.layers,
            kept=found.kept,
            removed=tuple(Removal(layer=layer, loss=loss) for layer, loss in found.removed),
            loss=found.loss,
            source=source,
            rows=len(rows),
            tokens=sum(len(row.positions) for row in rows),
            bytes=sum(file.stat().st_size for file in temporary.glob("*.safetensors")),
        )
        layout.write_text(temporary / "README.md", _readme(model, record))
        layout.write_text(layout.pruned_record(temporary), record.model_dump_json(indent=2, exclude_none=True) + "\n")
    return record


def _require_fewer(config: PruneConfig, layers: int) -> None:
    if config.keep_layers >= layers:
        hint = f"Choose 1 to {layers - 1}." if layers > 1 else "Take a deeper model."
        raise ConfigError(
            f"keep_layers = {config.keep_layers}: {config.model} has {layers} layers, so that none would go.", hint=hint
        )


def _check(require_same: Any, folder: Path, rows: Sequence[ProbeRow], loss: float, config: PruneConfig) -> None:
    """The folder has another name than the one it will get, which an error should not show."""
    try:
        require_same(folder, rows, loss)
    except ModelError as error:
        reason = error.message.removeprefix(f"{folder}: ")
        raise ModelError(
            f"{config.model} does not work with {config.keep_layers} of its layers: {reason}",
            hint="Keep more of them, or take another model.",
        ) from error


def _read_rows(config: PruneConfig, folder: Path) -> tuple[RowSource, list[ProbeRow]]:
    """What is measured on: rows spread over the file, cut to `MAX_TOKENS`."""
    tokenizer: Any = load_tokenizer(folder)
    length = min(MAX_TOKENS, context_length(folder) or MAX_TOKENS)
    if config.data is None:
        require_chat_template(tokenizer, config.model)
        if rows := _cut(_starter(tokenizer, config.rows), length):
            return "starter", rows
        raise InputError(
            f"no answer that ships has anything to learn in its first {length} tokens: the chat template of "
            f"{config.model} fills them.",
            hint="Give rows of your own with --data.",
        )
    files = layout.DataFolder(config.data)
    there = [name for name in _PREFERRED if files.split(name).is_file() and files.split(name).stat().st_size]
    if not there:
        raise InputError(
            "there is no data set: no train.jsonl, valid.jsonl or test.jsonl with rows.",
            path=config.data,
            hint=f"{MAKE_ONE}; or leave --data out to measure on the answers that ship.",
        )
    for name in there:
        split = tokenise_split(files.split(name), tokenizer, max_length=_ANY_LENGTH)
        # Some of the whole file, not its beginning: rows of one kind often stand together.
        if rows := _cut([split.rows[at] for at in _spread(range(len(split.rows)), config.rows)], length):
            return name, rows
    raise InputError(
        f"no row that was looked at has anything to learn in its first {length} tokens.",
        path=config.data,
        hint="Look at the rows, raise --rows, or leave --data out to measure on the answers that ship.",
    )


def _starter(tokenizer: Any, count: int) -> list[TokenRow]:
    path = layout.bundled("starter/answers")
    assert path is not None
    rows = []
    for number, recording in enumerate(_spread(list(recordings(path)), count), start=1):
        turns = [*recording.conversation, ("assistant", recording.answer.strip())]
        messages = tuple(Message.model_validate({"role": role, "content": content}) for role, content in turns)
        rows.append(Row(number, chat=ChatRow(messages=messages)))
    return [tokens for _, tokens in tokenise_rows(rows, tokenizer, path)]


def _cut(rows: Sequence[TokenRow], length: int) -> list[ProbeRow]:
    found = []
    for row in rows:
        tokens = tuple(row.tokens[:length].tolist())
        if positions := tuple(at - 1 for at, learnt in enumerate(row.loss_mask[:length].tolist()) if learnt):
            found.append(ProbeRow(tokens=tokens, positions=positions))
    return found


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of them, from first to last."""
    if len(items) <= count:
        return list(items)
    return [items[at * (len(items) - 1) // max(1, count - 1)] for at in range(count)]


def _readme(model: ModelRecord, record: PrunedRecord) -> str:
    """A model card. Its front matter is where the licence is looked for."""
    front = {"license": record.licence, "base_model": model.spec if model.source == "hub" else None}
    stated = [f"{key}: {json.dumps(value)}" for key, value in front.items() if value is not None]
    gone = ", ".join(str(removal.layer) for removal in record.removed)
    return "\n".join(
        [
            *(["---", *stated, "---", ""] if stated else []),
            f"# {model.name} with {len(record.kept)} of {record.layers} layers",
            "",
            f"Made from {record.model} by mlx-distill prune. These layers were taken out, in this order: {gone}.",
            f"On {record.rows} rows the mean loss went from {record.loss:.4f} to {record.removed[-1].loss:.4f} nats a "
            "token.",
            "It was not trained since.",
            "",
        ]
    )
