"""The step `train`.

Reads: data/NAME/{train,valid,test}.jsonl, manifest.json if there.
Writes: adapters/RUN/{adapters.safetensors,adapter_config.json,run.json,metrics.jsonl,checkpoints/,tensorboard/}.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_distill import __version__, layout
from mlx_distill.backends.base import ALONE, Peers, Student
from mlx_distill.config import TrainConfig
from mlx_distill.dataset import TokenSplit, load_splits, require_train_split
from mlx_distill.errors import ConfigError, DependencyError, OccupiedError
from mlx_distill.manifest import Manifest
from mlx_distill.models.folder import context_length
from mlx_distill.models.resolve import resolve, resolve_again
from mlx_distill.models.tokenizer import load_tokenizer, require_chat_template
from mlx_distill.progress import SILENT, Progress
from mlx_distill.records import ModelRecord, content_hash
from mlx_distill.run_records import MemoryPlan, RunRecord
from mlx_distill.training.loop import Loop
from mlx_distill.training.own_answers import longest_prompt
from mlx_distill.training.planning import Tokens, describe, plan_memory, with_cache
from mlx_distill.training.teaching import Taught, Teaching, open_teaching
from mlx_distill.training.together import common_plan, from_first, require_one_run, share_run
from mlx_distill.training.trackers import open_trackers, tracker_names

#: Raised when a change makes the same configuration give other numbers.
CODE_FORMAT = 3

#: Settings that do not decide the result. Backends, and rows computed at once, differ in rounding, and in what dropout
#: draws, alone: what was begun with one may go on with another.
_INDIFFERENT = {
    *(
        "run",
        "data",
        "teacher_logits",
        "teacher_online",
        "checkpoint_every",
        "keep_checkpoints",
        "report_to",
        "memory_limit",
        "prefix_cache",
    ),
    *("micro_batch_size", "gradient_checkpointing"),
    *("backend", "device"),
}

#: Settings on which the plan depends beside the backend and the number of processes.
_PLANNED_BY = ("memory_limit", "micro_batch_size", "gradient_checkpointing")

MakeStudent = Callable[[Path, TrainConfig, Peers], Student]


def train(config: TrainConfig, progress: Progress = SILENT, peers: Peers = ALONE) -> RunRecord:
    """Train an adapter, or go on with a run that was interrupted, or finish it where it stands.

    Args:
        config: Of the run.
        progress: Who watches.
        peers: The processes that train together. All call this with the same configuration; rank 0 writes the run, and
            the others a temporary folder.

    Returns:
        The record of the finished run. A run that was finished before is returned as it is.

    Raises:
        FolderError: Another process uses the folder.
        OccupiedError: It holds another run.
        InputError, ModelError, ConfigError: What was given cannot be used.
        DependencyError: A tracker that is to be reported to is not installed.
        TrainingError: The run cannot go on, or not be finished; the best adapter so far stands.
    """
    # Before a model is downloaded or a folder made.
    require_train_split(config.data)
    valid = layout.DataFolder(config.data).split("valid")
    _require_validation(config, valid.is_file() and valid.stat().st_size > 0)
    tracker_names(config.report_to)
    if peers.rank == 0:
        return _train_in(layout.RunFolder(config.run), config, progress, peers)
    with TemporaryDirectory(prefix="mlx-distill-rank-") as name:
        silent = config.model_copy(update={"report_to": None})
        return _train_in(layout.RunFolder(Path(name)), silent, progress, peers)


def _train_in(folder: layout.RunFolder, config: TrainConfig, progress: Progress, peers: Peers) -> RunRecord:
    with layout.lock(folder.root), ExitStack() as stack:
        layout.sweep(folder.root)
        layout.sweep(folder.checkpoints)
        make_student = student_maker(config)
        model = _base_model(folder, config, peers, progress)
        tokenizer = load_tokenizer(Path(model.path))
        require_chat_template(tokenizer, config.model)
        splits = load_splits(config.data, tokenizer, max_length=config.max_length, progress=progress)
        _require_validation(config, "valid" in splits)
        _require_room_for_answers(config, splits, Path(model.path))
        taught = open_teaching(config, splits, tokenizer, Path(model.path), progress)
        record = _new_record(config, model, splits, taught)
        require_one_run(peers, record)
        earlier = _common(peers, _earlier_run(folder, record))
        if earlier is not None and earlier.status == "finished":
            progress.say(f"{folder.root} is finished already; nothing to do.")
            return earlier
        trackers = stack.enter_context(open_trackers(config, folder, earlier or record, progress))
        with progress.task(f"Loading {model.name}"):
            student = make_student(Path(model.path), config, peers)
        record = record.model_copy(
            update={
                "device": student.device,
                "trainable_parameters": student.trainable_parameters,
                "processes": peers.size,
            }
        )
        share_run(peers, folder)
        teaching = taught and taught.teaching
        plan = _plan(student, teaching, splits, config, folder, earlier, peers)
        together = f"{peers.size} processes, this one on " if peers.size > 1 else ""
        progress.say(f"{together}{student.device}: {student.ways}.")
        progress.say(describe(plan))
        record = record.model_copy(update={"plan": plan})
        if earlier is not None and earlier.processes != peers.size:
            progress.say(
                f"Begun by {earlier.processes} process(es), goes on with {peers.size}: the same but for rounding."
            )
        if earlier is not None:
            record = record.model_copy(update={"created": earlier.created})
        loop = Loop(student, splits, config, folder, plan, progress, trackers.observe, peers, teaching)
        if loop.resume(None if earlier is None else earlier.config.get("checkpoint_every")):
            what = "Ends at" if config.finish else "Going on from"
            progress.say(f"{what} step {loop.cursor.step} of {loop.total_steps}.")
        # Not before: a run that cannot go on is left as it was.
        layout.write_text(folder.record, record.model_dump_json(indent=2, exclude_none=True) + "\n")
        return _train(loop, student, splits, folder, record, progress)


def _base_model(folder: layout.RunFolder, config: TrainConfig, peers: Peers, progress: Progress) -> ModelRecord:
    """The base model; of a run that rank 0 has begun, the one that it began with."""
    begun = layout.read_record(folder.record, RunRecord).model if folder.record.exists() else None
    found = from_first(peers, begun.model_dump_json().encode() if begun else b"")
    begun = ModelRecord.model_validate_json(found) if found else None
    if begun is not None and begun.spec == config.model:
        return resolve_again(begun, progress=progress)
    return resolve(config.model, progress=progress)


def _common(peers: Peers, earlier: RunRecord | None) -> RunRecord | None:
    """What rank 0 found of the run in its folder, for all."""
    found = from_first(peers, earlier.model_dump_json().encode() if earlier else b"")
    return RunRecord.model_validate_json(found) if found else None


def _train(
    loop: Loop,
    student: Student,
    splits: dict[str, TokenSplit],
    folder: layout.RunFolder,
    record: RunRecord,
    progress: Progress,
) -> RunRecord:
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
            "stopped_early": loop.stopped_early,
            "cut_short": cursor.step < loop.total_steps and not loop.stopped_early,
            "best_step": cursor.best_step,
            "first_valid_loss": cursor.first_valid_loss,
            "train_loss": cursor.train_loss,
            "valid_loss": cursor.best_loss,
            "token_accuracy": cursor.best_accuracy,
            "test_loss": test_loss,
            "first_divergence": cursor.first_divergence,
            "divergence": cursor.best_divergence,
            "tokens_per_second": cursor.trained_tokens / seconds if seconds else None,
            "peak_memory_bytes": student.peak_memory_bytes(),
            "seconds": cursor.seconds,
        }
    )
    layout.write_text(folder.record, record.model_dump_json(indent=2, exclude_none=True) + "\n")
    return record


def _plan(
    student: Student,
    teaching: Teaching | None,
    splits: dict[str, TokenSplit],
    config: TrainConfig,
    folder: layout.RunFolder,
    earlier: RunRecord | None,
    peers: Peers,
) -> MemoryPlan:
    """The memory plan, put into effect.

    A run that goes on keeps its own, so that it takes the very same steps. Where rows are kept makes no difference to
    them, and is decided anew.
    """
    now = (config.backend, peers.size, *(getattr(config, name) for name in _PLANNED_BY))
    tokens = Tokens(
        longest=max(int(split.lengths.max()) for split in splits.values()),
        trained=int(splits["train"].lengths.sum()),
        evaluated=sum(int(split.lengths.sum()) for name, split in splits.items() if name == "valid"),
        evaluated_targets=sum(split.target_tokens for name, split in splits.items() if name == "valid"),
        prompt=longest_prompt(splits["train"].rows) if config.on_policy else 0,
        answer=config.on_policy_tokens if config.on_policy else 0,
    )
    if earlier is not None and earlier.plan is not None and _planned_by(earlier) == now:
        plan = with_cache(earlier.plan, student, config, tokens, folder.root, teaching)
    else:
        mine = plan_memory(student, config, tokens, folder.root, processes=peers.size, teaching=teaching)
        plan = common_plan(peers, mine)
    student.adopt(plan, folder.root)
    if teaching is not None:
        teaching.keep(plan.said_bytes)
    return plan


def _planned_by(earlier: RunRecord) -> tuple[object, ...]:
    """What the plan of a run depended on, as `_PLANNED_BY` has it."""
    return (earlier.backend, earlier.processes, *(earlier.config.get(name) for name in _PLANNED_BY))


def _require_validation(config: TrainConfig, given: bool) -> None:
    asked = [name for name in ("patience", "validate_every") if getattr(config, name) is not None]
    if asked and not given:
        raise ConfigError(
            f"{asked[0]} = {getattr(config, asked[0])}: there is nothing to validate on: {config.data} has no "
            "valid.jsonl, or no row of it fits.",
            hint=f"Put rows into valid.jsonl, or leave --{asked[0].replace('_', '-')} out.",
        )


def _require_room_for_answers(config: TrainConfig, splits: dict[str, TokenSplit], model: Path) -> None:
    """Refuse on-policy training where no answer can be written to the rows' prompts."""
    if not config.on_policy:
        return
    longest, context = longest_prompt(splits["train"].rows), context_length(model)
    if longest <= 1:
        raise ConfigError(
            f"on_policy = {config.on_policy}: the rows of {config.data} are text without a prompt to answer.",
            hint="Leave --on-policy out, or take chats.",
        )
    if context is not None and longest + config.on_policy_tokens > context:
        raise ConfigError(
            f"on_policy_tokens = {config.on_policy_tokens}: with the longest prompt, of {longest} tokens, that is more "
            f"than the model's context of {context}.",
            hint="Lower --on-policy-tokens, or leave long rows out with --max-length.",
        )


def student_maker(config: TrainConfig) -> MakeStudent:
    """The backend that a configuration names.

    Raises:
        ConfigError: It does not go with the configuration's device.
    """
    if config.backend == "torch":
        return _torch_student
    if config.device != "auto":
        raise ConfigError(
            f"device = {config.device}: the MLX backend computes on MLX's own default.",
            hint="Leave --device out, or choose --backend torch.",
        )
    from mlx_distill.backends.mlx.group import Group
    from mlx_distill.backends.mlx.student import MlxStudent

    return lambda folder, config, peers: MlxStudent(folder, config, peers if isinstance(peers, Group) else None)


def _torch_student(folder: Path, config: TrainConfig, peers: Peers) -> Student:
    if peers.size > 1:
        raise ConfigError("The torch backend trains in one process.", hint="Leave mlx.launch out, or --backend torch.")
    try:
        from mlx_distill.backends.torch.student import TorchStudent
    except ImportError as error:
        raise DependencyError(error.name or "torch", extra="torch") from error
    return TorchStudent(folder, config)


def _new_record(
    config: TrainConfig, model: ModelRecord, splits: dict[str, TokenSplit], taught: Taught | None
) -> RunRecord:
    manifest_path = layout.DataFolder(config.data).manifest
    manifest = layout.read_record(manifest_path, Manifest) if manifest_path.exists() else None
    summaries = {name: split.summary() for name, split in splits.items()}
    # That it is to be finished is said of what there is, not of how it came to be.
    settings = config.model_dump(mode="json", exclude={"finish"})
    identity = content_hash(
        {
            "code": CODE_FORMAT,
            "config": {key: value for key, value in settings.items() if _decides(key, config)},
            "data": {name: summary.sha256 for name, summary in summaries.items()},
            "model": model.revision,
            **({} if taught is None else {"teacher": taught.sha256}),
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
        distilled_from=taught and taught.name,
        teacher_sha256=taught and taught.sha256,
        teacher_licence=taught and taught.licence,
    )


def _decides(key: str, config: TrainConfig) -> bool:
    """Whether a setting decides the result."""
    if key.startswith(("distill", "on_policy")) and config.distill == "off":
        return False
    return key not in _INDIFFERENT


def _earlier_run(folder: layout.RunFolder, record: RunRecord) -> RunRecord | None:
    """The record of the same run in this folder, or None if the folder is free."""
    if not folder.record.exists():
        if folder.adapter.exists():
            raise OccupiedError(
                f"{folder.root} holds an adapter that no run.json describes.", hint="Choose another --run folder."
            )
        if any(folder.checkpoints.glob("*.safetensors")):
            raise OccupiedError(
                f"{folder.checkpoints} holds checkpoints of a run that no run.json describes.",
                hint="Choose another --run folder, or remove them.",
            )
        return None
    earlier = layout.read_record(folder.record, RunRecord)
    if earlier.identity == record.identity:
        return earlier if folder.adapter.exists() else earlier.model_copy(update={"status": "running"})
    changed = [
        f"{key} {earlier.config.get(key)} → {value}"
        for key, value in record.config.items()
        # A setting that an earlier version did not have made no difference there.
        if key not in _INDIFFERENT and key in earlier.config and earlier.config[key] != value
    ]
    if {n: s.sha256 for n, s in earlier.splits.items()} != {n: s.sha256 for n, s in record.splits.items()}:
        changed.append("the data set")
    if earlier.model.revision != record.model.revision:
        changed.append("the base model")
    if earlier.teacher_sha256 != record.teacher_sha256:
        changed.append(f"the teacher ({earlier.distilled_from} → {record.distilled_from}), or what it was asked for")
    raise OccupiedError(
        f"{folder.root} holds another run. Different: {'; '.join(changed) or 'the version of mlx-distill'}.",
        hint="Choose another --run folder, or remove this one if you no longer need it.",
    )
