"""The step `compare`.

Reads: adapters/RUN/ (run.json, fused/), the base model, a prompt file.
Writes: visuals/NAME/{generations.jsonl,comparison.json,teacher.db}.

All contenders get the same prompts and one token budget; an answer cut by it is flagged, not hidden. Local models
answer greedily. Each answer is kept the moment it is whole, and a later call with the same models and budget asks
only for what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from mlx_distill import layout
from mlx_distill.asking import ask_all, run_interruptible
from mlx_distill.config import CompareConfig
from mlx_distill.errors import TeacherError
from mlx_distill.ledger import Ledger
from mlx_distill.models.resolve import resolve
from mlx_distill.progress import SILENT, Progress
from mlx_distill.prompts import load_prompts
from mlx_distill.records import ComparisonRecord, Contender, Generation, Message, Prompt, Request, content_hash
from mlx_distill.run_records import RunRecord
from mlx_distill.runs import read_fused, read_run
from mlx_distill.teachers.base import request_name
from mlx_distill.teachers.registry import open_teacher

#: Raised when a change makes the same models and prompts give other answers.
CODE_FORMAT = 1


def comparison_folder(config: CompareConfig) -> Path:
    """Where the comparison goes."""
    return config.out or Path("visuals") / config.run.resolve().name


def compare(config: CompareConfig, progress: Progress = SILENT) -> ComparisonRecord:
    """Let teacher, base and distilled student answer the prompts.

    Raises:
        InputError: The run, its fused model or the prompts are missing or unreadable, or a prompt does not fit.
        TeacherError: The teacher could not answer every prompt. What it did answer is kept.
        FolderError: Another process uses the folder.
    """
    run = read_run(config.run)
    fused_folder = config.fused or layout.RunFolder(config.run).fused
    fused = read_fused(fused_folder, config.run)
    prompts = load_prompts(config.prompts)
    folder = layout.ComparisonFolder(comparison_folder(config))
    with layout.lock(folder.root):
        base = resolve(run.model.spec, progress=progress)
        models: dict[Contender, str] = {
            "base": f"{base.name}@{(base.revision or 'folder')[:12]}",
            "distilled": f"{config.run.resolve().name}@{fused.adapter_sha256[:12]}",
        }
        if config.teacher is not None:
            models = {"teacher": config.teacher, **models}
        kept = _keep_valid(folder, models, prompts, config)
        if config.teacher is not None:
            kept += _ask_teacher(config, config.teacher, prompts, folder, kept, progress)
        device = run.device
        local: dict[Contender, Path] = {"base": Path(base.path), "distilled": fused_folder}
        for contender, path in local.items():
            missing = _missing(contender, prompts, kept)
            if missing:
                made, device = _generate(contender, models, path, missing, config, folder, progress)
                kept += made
        _write_in_order(folder, models, prompts, kept)
        record = _record(config, folder, run, models, prompts, kept, device)
        layout.write_text(folder.record, record.model_dump_json(indent=2, exclude_none=True) + "\n")
    return record


def _conversation(prompt: Prompt) -> list[Message]:
    system = [Message(role="system", content=prompt.system)] if prompt.system else []
    return [*system, Message(role="user", content=prompt.text)]


def _keep_valid(
    folder: layout.ComparisonFolder, models: dict[Contender, str], prompts: Sequence[Prompt], config: CompareConfig
) -> list[Generation]:
    """The answers of an earlier call that still hold; the file is rewritten to hold just these."""
    by_id = {prompt.id: prompt for prompt in prompts}
    kept = [
        row
        for row in layout.read_rows(folder.generations, Generation)
        # A teacher's answers live in its ledger, and are taken from there.
        if row.contender != "teacher"
        and models.get(row.contender) == row.model
        and by_id.get(row.prompt.id) == row.prompt
        and row.max_tokens == config.max_tokens
        and row.repetition_penalty == config.repetition_penalty
    ]
    layout.write_text(folder.generations, "".join(row.to_json() + "\n" for row in kept))
    return kept


def _write_in_order(
    folder: layout.ComparisonFolder, models: dict[Contender, str], prompts: Sequence[Prompt], rows: Sequence[Generation]
) -> None:
    """Write the answers by contender and prompt: the same answers are the same file, however often it was resumed."""
    contenders, ids = list(models), [prompt.id for prompt in prompts]
    ordered = sorted(rows, key=lambda row: (contenders.index(row.contender), ids.index(row.prompt.id)))
    layout.write_text(folder.generations, "".join(row.to_json() + "\n" for row in ordered))


def _missing(contender: str, prompts: Sequence[Prompt], kept: Sequence[Generation]) -> list[Prompt]:
    have = {row.prompt.id for row in kept if row.contender == contender}
    return [prompt for prompt in prompts if prompt.id not in have]


def _ask_teacher(
    config: CompareConfig,
    spec: str,
    prompts: Sequence[Prompt],
    folder: layout.ComparisonFolder,
    kept: Sequence[Generation],
    progress: Progress,
) -> list[Generation]:
    async def ask() -> list[Generation]:
        teacher = open_teacher(spec)
        requests = [
            Request(
                prompt_id=prompt.id,
                family=prompt.family,
                teacher=request_name(teacher),
                messages=(Message(role="user", content=prompt.text),),
                system=prompt.system,
                max_tokens=config.max_tokens,
            )
            for prompt in prompts
        ]
        try:
            with Ledger(folder.teacher_ledger) as ledger:
                await ask_all(requests, teacher, ledger, concurrency=config.concurrency, progress=progress)
                entries = ledger.entries(request.key for request in requests)
                replies = {entry.request.key: entry.reply for entry in entries if entry.reply is not None}
        finally:
            await teacher.close()
        unanswered = [request.prompt_id for request in requests if request.key not in replies]
        if unanswered:
            raise TeacherError(
                f"{spec} left {len(unanswered)} of {len(requests)} prompts unanswered: {', '.join(unanswered)}.",
                hint="The same command asks again for these alone.",
            )
        return [
            Generation(
                prompt=prompt,
                contender="teacher",
                model=spec,
                text=replies[request.key].text,
                stop=replies[request.key].stop,
                output_tokens=replies[request.key].usage.output_tokens,
                seconds=replies[request.key].seconds,
                max_tokens=config.max_tokens,
            )
            for prompt, request in zip(prompts, requests, strict=True)
        ]

    rows = run_interruptible(ask())
    for row in rows:
        layout.append_row(folder.generations, row)
    return rows


def _generate(
    contender: Contender,
    models: dict[Contender, str],
    path: Path,
    prompts: Sequence[Prompt],
    config: CompareConfig,
    folder: layout.ComparisonFolder,
    progress: Progress,
) -> tuple[list[Generation], str]:
    from mlx_distill.backends.mlx.generation import Generator

    with progress.task(f"Loading {contender}"):
        generator = Generator(path)
    made: list[Generation] = []
    # Answers mostly end before the budget, so the bar counts tokens without a total.
    with progress.task(f"{contender.capitalize()} answers {len(prompts)} prompts", unit="tokens") as bar:
        answers = generator.answer(
            [_conversation(prompt) for prompt in prompts],
            max_tokens=config.max_tokens,
            repetition_penalty=config.repetition_penalty,
            batch_size=config.batch_size,
            names=[prompt.id for prompt in prompts],
            bar=bar,
        )
        for answer in answers:
            row = Generation(
                prompt=prompts[answer.index],
                contender=contender,
                model=models[contender],
                text=answer.text,
                stop=answer.stop,
                output_tokens=answer.tokens,
                seconds=round(answer.seconds, 3),
                max_tokens=config.max_tokens,
                repetition_penalty=config.repetition_penalty,
            )
            layout.append_row(folder.generations, row)
            made.append(row)
    return made, generator.device


def _record(
    config: CompareConfig,
    folder: layout.ComparisonFolder,
    run: RunRecord,
    models: dict[Contender, str],
    prompts: Sequence[Prompt],
    rows: Sequence[Generation],
    device: str,
) -> ComparisonRecord:
    seconds: dict[Contender, float] = {}
    speed: dict[Contender, float] = {}
    for contender in models:
        own = [row for row in rows if row.contender == contender]
        if contender == "teacher":
            spent = sum(row.seconds for row in own)
        else:
            # Answers of a batch are made at once: the last to end tells the time of all.
            spent = max(row.seconds for row in own)
            if spent > 0:
                speed[contender] = round(sum(row.output_tokens for row in own) / spent, 2)
        seconds[contender] = round(spent, 3)
    return ComparisonRecord(
        name=folder.root.resolve().name,
        run=str(config.run),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        teacher=config.teacher,
        models=models,
        prompts=str(config.prompts),
        prompts_sha256=content_hash([prompt.model_dump(exclude_none=True) for prompt in prompts]),
        max_tokens=config.max_tokens,
        repetition_penalty=config.repetition_penalty,
        device=device,
        seconds=seconds,
        tokens_per_second=speed,
    )
