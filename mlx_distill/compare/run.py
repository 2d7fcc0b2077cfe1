"""The step `compare`.

Reads: adapters/RUN/ (run.json, fused/), the base model, a local teacher, a prompt file, tasks,
       data/NAME/{test,valid}.jsonl.
Writes: visuals/NAME/{generations.jsonl,comparison.json,outcomes.jsonl,heldout.jsonl,teacher.db}.

All contenders get the same prompts and one token budget; an answer cut by it is flagged, not hidden. Each answer is
kept the moment it is whole, and a later call with the same models and budget asks only for what is missing. Answers to
tasks are run against their hidden tests, each in a process of its own; see `mlx_distill.evaluation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from mlx_distill import layout
from mlx_distill.agreement import ProbeRow
from mlx_distill.compare.asked import ask
from mlx_distill.compare.contenders import AskedContender, Contending, LocalContender, contenders_of
from mlx_distill.compare.distribution import Source, read_teacher, source_of
from mlx_distill.compare.held_out import held_out_rows
from mlx_distill.compare.local import Wanted, answer
from mlx_distill.compare.questions import Questions, questions_of, sets_of
from mlx_distill.compare.testing import run_tests
from mlx_distill.config import CompareConfig
from mlx_distill.evaluation.scoring import scoring_sha256
from mlx_distill.progress import SILENT, Progress
from mlx_distill.records import ComparisonRecord, Generation, content_hash
from mlx_distill.runs import read_fused, read_run
from mlx_distill.scores import HeldOutLoss

#: Raised when a change makes the same models and prompts give other answers, or other outcomes.
CODE_FORMAT = 2


def comparison_folder(config: CompareConfig) -> Path:
    """Where the comparison goes."""
    return config.out or Path("visuals") / config.run.resolve().name


def compare(config: CompareConfig, progress: Progress = SILENT) -> ComparisonRecord:
    """Let teacher, base, distilled student and others answer, and test the answers that can be tested.

    Raises:
        ConfigError: What names the others cannot be read, or the budget cannot be held.
        InputError: The run, its fused model, the prompts or the tasks are missing or unreadable, or a prompt does not
            fit.
        TeacherError: A teacher could not answer every prompt. What it did answer is kept.
        IsolationError: Programs cannot be run safely here; the answers are kept.
        FolderError: Another process uses the folder.
    """
    run = read_run(config.run)
    fused = read_fused(config.fused or layout.RunFolder(config.run).fused, config.run)
    questions = questions_of(config)
    folder = layout.ComparisonFolder(comparison_folder(config))
    with layout.lock(folder.root):
        contenders = contenders_of(config, run, fused, progress)
        base = next(c for c in contenders if isinstance(c, LocalContender) and c.name == "base")
        held_out = held_out_rows(run, base.folder, config.held_out, progress)
        rows = _keep_valid(folder, contenders, questions, config)
        source = source_of(config, run, base.folder, progress) if held_out else Source()
        unread = _keep_read(folder, contenders, held_out, source)
        # Once, about all rows, and before the first model that reads them is loaded.
        every = {sha256: row for own in unread.values() for sha256, row in own.items()}
        teacher = cache(lambda: read_teacher(source, every, progress))
        device = run.device
        for contender in contenders:
            if isinstance(contender, AskedContender):
                rows += ask(contender, questions.prompts, frozenset(questions.tasks), config, folder, progress)
                continue
            wanted = _missing(contender, questions, rows, config.samples)
            to_read = unread.get(contender.name, {})
            if wanted or to_read:
                said = teacher() if to_read else None
                made, device = answer(contender, wanted, to_read, said, config, folder, progress)
                rows += made
        rows = _in_order(contenders, questions, rows)
        layout.write_text(folder.generations, "".join(row.to_json() + "\n" for row in rows))
        if questions.tasks:
            run_tests(rows, questions.tasks, folder, sandbox=config.sandbox, progress=progress)
        else:
            folder.outcomes.unlink(missing_ok=True)
        record = _record(config, folder, contenders, questions, rows, device)
        layout.write_text(folder.record, record.model_dump_json(indent=2, exclude_none=True) + "\n")
    return record


def _keep_valid(
    folder: layout.ComparisonFolder, contenders: Sequence[Contending], questions: Questions, config: CompareConfig
) -> list[Generation]:
    """The answers of an earlier call that still hold; the file is rewritten to hold just these."""
    by_id = {prompt.id: prompt for prompt in questions.prompts}
    # A teacher's answers live in its ledger, and are taken from there.
    models = {contender.name: contender.model for contender in contenders if isinstance(contender, LocalContender)}
    kept = [
        row
        for row in layout.read_rows(folder.generations, Generation)
        if models.get(row.contender) == row.model
        and by_id.get(row.prompt.id) == row.prompt
        and row.sample < config.samples
        and (row.max_tokens, row.repetition_penalty) == (config.max_tokens, config.repetition_penalty)
        and (row.temperature, row.seed if row.temperature else 0)
        == (config.temperature, config.seed if config.temperature else 0)
    ]
    layout.write_text(folder.generations, "".join(row.to_json() + "\n" for row in kept))
    return kept


def _keep_read(
    folder: layout.ComparisonFolder, contenders: Sequence[Contending], rows: dict[str, ProbeRow], source: Source
) -> dict[str, dict[str, ProbeRow]]:
    """What each contender has yet to read, by the hash of its tokens.

    The file is rewritten to hold just what an earlier call read and still holds.
    """
    # Others may have another tokenizer: losses a token say nothing between two of these.
    models = {contender.name: contender.model for contender in contenders if contender.name in ("base", "distilled")}
    kept = {
        (row.contender, row.row_sha256): source.fitting(row)
        for row in layout.read_rows(folder.held_out, HeldOutLoss)
        if row.row_sha256 in rows and models.get(row.contender) == row.model and source.holds(row)
    }
    if rows:
        layout.write_text(folder.held_out, "".join(row.to_json() + "\n" for row in kept.values()))
    else:
        folder.held_out.unlink(missing_ok=True)
    return {name: {sha256: row for sha256, row in rows.items() if (name, sha256) not in kept} for name in models}


def _missing(contender: LocalContender, questions: Questions, kept: Sequence[Generation], samples: int) -> list[Wanted]:
    have = {(row.prompt.id, row.sample) for row in kept if row.contender == contender.name}
    return [
        (prompt, sample) for prompt in questions.prompts for sample in range(samples) if (prompt.id, sample) not in have
    ]


def _in_order(contenders: Sequence[Contending], questions: Questions, rows: Sequence[Generation]) -> list[Generation]:
    """By contender and prompt: the same answers are the same file, however often it was resumed."""
    names = {contender.name: at for at, contender in enumerate(contenders)}
    ids = {prompt.id: at for at, prompt in enumerate(questions.prompts)}
    return sorted(rows, key=lambda row: (names[row.contender], ids[row.prompt.id], row.sample))


def _record(
    config: CompareConfig,
    folder: layout.ComparisonFolder,
    contenders: Sequence[Contending],
    questions: Questions,
    rows: Sequence[Generation],
    device: str,
) -> ComparisonRecord:
    seconds: dict[str, float] = {}
    speed: dict[str, float] = {}
    for contender in contenders:
        own = [row for row in rows if row.contender == contender.name]
        if isinstance(contender, AskedContender):
            spent = sum(row.seconds for row in own)
        else:
            # Answers of a batch are made at once: the last to end tells the time of all.
            spent = max(row.seconds for row in own)
            if spent > 0:
                speed[contender.name] = round(sum(row.output_tokens for row in own) / spent, 2)
        seconds[contender.name] = round(spent, 3)
    return ComparisonRecord(
        name=folder.root.resolve().name,
        run=str(config.run),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        teacher=config.teacher,
        models={contender.name: contender.model for contender in contenders},
        prompts=None if config.prompts is None else str(config.prompts),
        prompts_sha256=content_hash([prompt.model_dump(exclude_none=True) for prompt in questions.prompts]),
        evals=sets_of(config.eval),
        tasks_sha256={name: scoring_sha256(task) for name, task in questions.tasks.items()},
        samples=config.samples,
        temperature=config.temperature,
        seed=config.seed,
        max_tokens=config.max_tokens,
        repetition_penalty=config.repetition_penalty,
        device=device,
        seconds=seconds,
        tokens_per_second=speed,
    )
