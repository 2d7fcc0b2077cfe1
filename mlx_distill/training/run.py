"""The step `train`.

Reads: data/NAME/{train,valid,test}.jsonl, manifest.json if there.
Writes: adapters/RUN/{adapters.safetensors,adapter_config.json,run.json,metrics.jsonl,checkpoints/}.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from mlx_distill import __version__, layout
from mlx_distill.backends.base import Student
from mlx_distill.config import TrainConfig
from mlx_distill.dataset import TokenSplit, load_splits, require_train_split
from mlx_distill.errors import OccupiedError
from mlx_distill.models.resolve import resolve
from mlx_distill.models.tokenizer import load_tokenizer, require_chat_template
from mlx_distill.progress import SILENT, Progress
from mlx_distill.records import Manifest, ModelRecord, content_hash
from mlx_distill.run_records import RunRecord
from mlx_distill.training.loop import Loop

#: Raised when a change makes the same configuration give other numbers.
CODE_FORMAT = 1

#: Settings that do not decide the result.
_INDIFFERENT = {"run", "data", "checkpoint_every", "keep_checkpoints"}

MakeStudent = Callable[[Path, TrainConfig], Student]


def train(config: TrainConfig, progress: Progress = SILENT) -> RunRecord:
    """Train an adapter, or go on with a run that was interrupted.

    Returns:
        The record of the finished run. A run that was finished before is returned as it is.

    Raises:
        FolderError: Another process uses the folder.
        OccupiedError: It holds another run.
        InputError, ModelError, ConfigError: What was given cannot be used.
        TrainingError: The run cannot go on; the best adapter so far stands.
    """
    # Before a model is downloaded or a folder made.
    require_train_split(config.data)
    folder = layout.RunFolder(config.run)
    with layout.lock(folder.root):
        layout.sweep(folder.root)
        layout.sweep(folder.checkpoints)
        model = resolve(config.model, progress=progress)
        tokenizer = load_tokenizer(Path(model.path))
        require_chat_template(tokenizer, config.model)
        splits = load_splits(config.data, tokenizer, max_length=config.max_length, progress=progress)
        record = _new_record(config, model, splits)
        earlier = _earlier_run(folder, record)
        if earlier is not None and earlier.status == "finished" and folder.adapter.exists():
            progress.say(f"{folder.root} is finished already; nothing to do.")
            return earlier
        with progress.task(f"Loading {model.name}"):
            student = _backend(config.backend)(Path(model.path), config)
        record = record.model_copy(
            update={"device": student.device, "trainable_parameters": student.trainable_parameters}
        )
        if earlier is None:
            layout.write_text(folder.record, record.model_dump_json(indent=2, exclude_none=True) + "\n")
        else:
            record = record.model_copy(update={"created": earlier.created})
        return _train(student, splits, config, folder, record, progress)


def _train(
    student: Student,
    splits: dict[str, TokenSplit],
    config: TrainConfig,
    folder: layout.RunFolder,
    record: RunRecord,
    progress: Progress,
) -> RunRecord:
    loop = Loop(student, splits, config, folder, progress)
    if loop.resume():
        progress.say(f"Going on from step {loop.cursor.step} of {loop.total_steps}.")
    if "valid" not in splits:
        progress.say(
            "Nothing to validate on (no valid.jsonl, or no row of it fits): the last adapter is kept, not the best."
        )
    cursor = loop.run()
    test_loss = None
    if "test" in splits:
        with progress.task("Testing"):
            student.load_adapter(folder.root)
            stats = loop.evaluate("test")
        loop.record_test(stats)
        test_loss = stats.loss
    seconds = cursor.training_seconds
    record = record.model_copy(
        update={
            "status": "finished",
            "epochs": cursor.epoch,
            "steps": cursor.step,
            "best_step": cursor.best_step,
            "first_valid_loss": cursor.first_valid_loss,
            "train_loss": cursor.train_loss,
            "valid_loss": cursor.best_loss,
            "token_accuracy": cursor.best_accuracy,
            "test_loss": test_loss,
            "tokens_per_second": cursor.trained_tokens / seconds if seconds else None,
            "peak_memory_bytes": student.peak_memory_bytes(),
            "seconds": cursor.seconds,
        }
    )
    layout.write_text(folder.record, record.model_dump_json(indent=2, exclude_none=True) + "\n")
    return record


def _backend(name: str) -> MakeStudent:
    assert name == "mlx"
    from mlx_distill.backends.mlx.student import MlxStudent

    return MlxStudent


def _new_record(config: TrainConfig, model: ModelRecord, splits: dict[str, TokenSplit]) -> RunRecord:
    manifest_path = layout.DataFolder(config.data).manifest
    manifest = layout.read_record(manifest_path, Manifest) if manifest_path.exists() else None
    summaries = {name: split.summary() for name, split in splits.items()}
    settings = config.model_dump(mode="json")
    identity = content_hash(
        {
            "code": CODE_FORMAT,
            "config": {key: value for key, value in settings.items() if key not in _INDIFFERENT},
            "data": {name: summary.sha256 for name, summary in summaries.items()},
            "model": model.revision,
        }
    )
    return RunRecord(
        identity=identity,
        status="running",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        backend=config.backend,
        device="",
        model=model,
        config=settings,
        splits=summaries,
        trainable_parameters=0,
        manifest=manifest,
    )


def _earlier_run(folder: layout.RunFolder, record: RunRecord) -> RunRecord | None:
    """The record of the same run in this folder, or None if the folder is free."""
    if not folder.record.exists():
        if folder.adapter.exists():
            raise OccupiedError(
                f"{folder.root} holds an adapter that no run.json describes.", hint="Choose another --run folder."
            )
        return None
    earlier = layout.read_record(folder.record, RunRecord)
    if earlier.identity == record.identity:
        return earlier
    changed = [
        f"{key} {earlier.config.get(key)} → {value}"
        for key, value in record.config.items()
        if key not in _INDIFFERENT and earlier.config.get(key) != value
    ]
    if {n: s.sha256 for n, s in earlier.splits.items()} != {n: s.sha256 for n, s in record.splits.items()}:
        changed.append("the data set")
    if earlier.model.revision != record.model.revision:
        changed.append("the base model")
    raise OccupiedError(
        f"{folder.root} holds another run. Different: {'; '.join(changed) or 'the version of mlx-distill'}.",
        hint="Choose another --run folder, or remove this one if you no longer need it.",
    )
