"""`run`: walk a recipe from prompts to report, skipping each step whose inputs have not changed.

After a step, a stamp beside its output notes what it was made from: its configuration, the format number of its code,
and the content of the files it read and wrote. A step whose stamp still holds is skipped. Steps pick up their own
interrupted work, so an interrupted walk goes on where it stopped.

Writes: `.steps/STEP.json` in each step's folder, beside what the steps write.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlx_distill import layout
from mlx_distill.errors import ConfigError, InputError, OccupiedError
from mlx_distill.progress import SILENT, Progress
from mlx_distill.recipe import Recipe
from mlx_distill.records import Record, content_hash
from mlx_distill.settings import Settings

STEPS = ("prompts", "collect", "train", "fuse", "compare", "judge", "report")


class FileMark(Record):
    """What a file held. Size and time tell cheaply that it has not changed; the hash (see `_digest`) tells for sure."""

    size: int
    mtime_ns: int
    sha256: str


class Stamp(Record):
    """What a step's output was made from.

    Attributes:
        setting: Hash of the step's configuration and of its code's format number.
        files: Every file it read or wrote, by path.
    """

    format: Literal[1] = 1
    setting: str
    files: dict[str, FileMark]


@dataclass(frozen=True)
class Step:
    """One step of a walk.

    Attributes:
        folder: Where its stamp goes.
        reads: Files whose content decides the result.
        writes: Files that must be there afterwards.
        code: Format number of its code.
        run: Does it.
        facts: What else decides the result, such as a teacher's revision.
        results: What is moved aside before it starts anew: results that took time to make. All else that it writes
            follows from what it reads, and is written over.
    """

    name: str
    config: Settings
    folder: Path
    reads: Sequence[Path]
    writes: Sequence[Path]
    code: int
    run: Callable[[Progress], Any]
    facts: dict[str, Any] = field(default_factory=dict)
    results: Sequence[Path] = ()

    @property
    def setting(self) -> str:
        """Identity of all but the files."""
        return content_hash([self.name, self.config.model_dump(mode="json"), self.code, self.facts])


@dataclass(frozen=True)
class StepOutcome:
    """How a step of a walk went."""

    step: str
    status: Literal["done", "unchanged"]
    seconds: float


def walk(recipe: Recipe, *, force: Sequence[str] = (), progress: Progress = SILENT) -> list[StepOutcome]:
    """Walk a recipe.

    Args:
        force: Steps to run again although nothing changed. The run, the answers of the local models or the verdicts
            that they made before are moved aside; answers that were paid for are kept in their ledger.

    Raises:
        ConfigError: A forced step does not exist.
        MlxDistillError: A step failed; those before it stand.
    """
    for name in force:
        if name not in STEPS:
            raise ConfigError(f"--force {name}: there is no such step.", hint=f"Steps: {', '.join(STEPS)}.")
    # The recipe's name is held against a second walk; each step also holds the folder that it writes.
    with layout.lock(layout.DataFolder(recipe.collect.out).root / ".steps"):
        return _walk(recipe, force, progress)


def _walk(recipe: Recipe, force: Sequence[str], progress: Progress) -> list[StepOutcome]:
    outcomes: list[StepOutcome] = []
    for make in (_prompts, _collect, _train, _fuse, _compare, _judge, _report):
        started = time.perf_counter()
        step = make(recipe)
        forced = step.name in force
        if not forced and _unchanged(step):
            progress.say(f"{step.name}: unchanged, skipped.")
            outcomes.append(StepOutcome(step.name, "unchanged", time.perf_counter() - started))
            continue
        progress.say(f"{step.name}: {_purpose(step.config)}")
        if forced:
            _displace(step, progress)
        _run(step, progress)
        _write_stamp(make(recipe))
        outcomes.append(StepOutcome(step.name, "done", time.perf_counter() - started))
    return outcomes


def _run(step: Step, progress: Progress) -> None:
    """Run a step. What an earlier walk made there from other inputs is moved aside; what anyone else made is not."""
    try:
        step.run(progress)
    except OccupiedError as error:
        if not layout.stamp(step.folder, step.name).exists():
            raise OccupiedError(
                error.message, hint=f"Move it aside:  --force {step.name}     Or keep both:  --set name=OTHER"
            ) from None
        progress.say(error.message)
        _displace(step, progress)
        step.run(progress)


def _displace(step: Step, progress: Progress) -> None:
    """Rename a step's results to PATH.before-N, with the first N that is free."""
    for path in step.results:
        if not path.exists():
            continue
        with layout.lock(step.folder):
            number = 1
            while (target := path.with_name(f"{path.name}.before-{number}")).exists():
                number += 1
            path.rename(target)
        progress.say(f"{path} was moved aside, to {target}.")


def _purpose(config: Settings) -> str:
    return (type(config).__doc__ or "").strip().splitlines()[0]


def _unchanged(step: Step) -> bool:
    path = layout.stamp(step.folder, step.name)
    if not path.exists():
        return False
    try:
        stamp = layout.read_record(path, Stamp)
    except InputError:
        return False
    expected = {str(file) for file in (*step.reads, *step.writes)}
    if stamp.setting != step.setting or set(stamp.files) != expected:
        return False
    return all(_same(Path(name), mark) for name, mark in stamp.files.items())


def _same(path: Path, mark: FileMark) -> bool:
    if not path.is_file():
        return False
    stat = path.stat()
    return (stat.st_size, stat.st_mtime_ns) == (mark.size, mark.mtime_ns) or _digest(path) == mark.sha256


def _digest(path: Path) -> str:
    """Of what a file holds; of a run's record without what `fuse` adds to it, or training would then look changed."""
    if path == layout.RunFolder(path.parent).record:
        with contextlib.suppress(ValueError):
            record = json.loads(path.read_bytes())
            if isinstance(record, dict):
                record.pop("fusing", None)
            return content_hash(record)
    return layout.file_sha256(path)


def _write_stamp(step: Step) -> None:
    files = {}
    for path in (*step.reads, *step.writes):
        stat = path.stat()
        files[str(path)] = FileMark(size=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=_digest(path))
    stamp = Stamp(setting=step.setting, files=files)
    layout.write_text(layout.stamp(step.folder, step.name), stamp.model_dump_json(indent=2) + "\n")


def _revision(teacher: str) -> str:
    """What answers under a teacher's spec now; opened only where that costs nothing."""
    if not teacher.startswith("recorded:"):
        return teacher
    from mlx_distill.teachers.base import request_name
    from mlx_distill.teachers.registry import open_teacher

    return request_name(open_teacher(teacher))


def _fingerprint(model: str) -> str | None:
    """Of a local model's folder, whose files anyone can change; None of what is none."""
    from mlx_distill.models.folder import fingerprint

    folder = Path(model.removeprefix("mlx:")).expanduser()
    return fingerprint(folder) if (folder / "config.json").is_file() else None


def _prompts(recipe: Recipe) -> Step:
    from mlx_distill import prompts
    from mlx_distill.evaluation.tasks import read_prompts

    config = recipe.prompts
    assert config.out is not None
    out = config.out

    def run(_progress: Progress) -> None:
        prompts.write_prompts(out, read_prompts(config.file, modifiers=config.modifiers))

    return Step("prompts", config, out.parent, [layout.find_input(config.file)], [out], prompts.CODE_FORMAT, run)


def _collect(recipe: Recipe) -> Step:
    from mlx_distill.collect import run as collecting
    from mlx_distill.evaluation.tasks import is_task_file
    from mlx_distill.judges import choosing
    from mlx_distill.judges import run as judging

    config = recipe.collect
    if config.prompts == recipe.prompts.out and is_task_file(recipe.prompts.file):
        # Their hidden tests are in the file alone.
        config = config.model_copy(update={"prompts": layout.find_input(recipe.prompts.file)})
    judge = {"rubric": judging.CODE_FORMAT, "judge": _revision(config.judge)} if config.choose == "best" else {}
    folder = layout.DataFolder(config.out)
    splits = [folder.split(name) for name in layout.SPLITS if name == "train" or folder.split(name).exists()]

    def run(progress: Progress) -> None:
        manifest = collecting.collect_from_spec(config, progress, scorer=choosing.open_scorer(config))
        collecting.require_all_answered(manifest)

    return Step(
        "collect",
        config,
        folder.root,
        [config.prompts],
        [folder.manifest, *splits],
        collecting.CODE_FORMAT,
        run,
        facts={"teacher": _revision(config.teacher), **judge},
    )


def _train(recipe: Recipe) -> Step:
    from mlx_distill.training import run as training

    config = recipe.train
    model = Path(config.model).expanduser()
    data = layout.DataFolder(config.data)
    folder = layout.RunFolder(config.run)
    splits = [data.split(name) for name in layout.SPLITS if data.split(name).exists()]
    taught = [layout.logits_record(config.teacher_logits)] if config.teacher_logits else []
    return Step(
        "train",
        config,
        folder.root,
        [*splits, *taught, *([model] if model.is_file() else [])],
        [folder.adapter, folder.adapter_config, folder.record],
        training.CODE_FORMAT,
        lambda progress: training.train(config, progress),
        facts={
            "model": _fingerprint(config.model),
            **({"teacher": _fingerprint(config.teacher_online)} if config.teacher_online else {}),
        },
        results=[folder.root],
    )


def _fuse(recipe: Recipe) -> Step:
    from mlx_distill import fuse as fusing

    config = recipe.fuse
    run = layout.RunFolder(config.run)
    out = fusing.fused_folder(config)
    weights = sorted(out.glob("*.safetensors")) or [out / "model.safetensors"]
    # Rows of the run's own data: with them the adapter has changed, too.
    named = [layout.DataFolder(config.data).split(name) for name in layout.SPLITS] if config.data else []
    return Step(
        "fuse",
        config,
        run.root,
        [run.adapter, *(path for path in named if path.is_file())],
        [layout.fused_record(out), *weights],
        fusing.CODE_FORMAT,
        lambda progress: fusing.fuse(config, progress),
    )


def _compare(recipe: Recipe) -> Step:
    from mlx_distill.compare import run as comparing
    from mlx_distill.compare.questions import task_files

    config = recipe.compare
    folder = layout.ComparisonFolder(comparing.comparison_folder(config))
    run = layout.RunFolder(config.run)
    asked = [*([layout.find_input(config.prompts)] if config.prompts else []), *task_files(config.eval)]
    return Step(
        "compare",
        config,
        folder.root,
        [*asked, layout.fused_record(config.fused or run.fused)],
        [folder.generations, folder.record, *([folder.outcomes] if config.eval else [])],
        comparing.CODE_FORMAT,
        lambda progress: comparing.compare(config, progress),
        facts={"teacher": _revision(config.teacher) if config.teacher else None},
        results=[folder.generations],
    )


def _judge(recipe: Recipe) -> Step:
    from mlx_distill.judges import calibrate as calibrating
    from mlx_distill.judges import run as judging

    config = recipe.judge
    folder = layout.ComparisonFolder(config.comparison)
    rows = [folder.verdicts, *([folder.duels] if config.pairwise else [])]
    labels = [config.calibrate] if config.calibrate is not None else []

    def run(progress: Progress) -> None:
        judged = judging.judge_all(config, judging.judges_from_spec(config, progress), progress)
        judging.require_verdicts(judged)
        if labels:
            calibrating.calibrate(config)

    return Step(
        "judge",
        config,
        folder.root,
        [folder.generations, *labels],
        [*rows, *([folder.calibration] if labels else [])],
        judging.CODE_FORMAT,
        run,
        results=rows,
    )


def _report(recipe: Recipe) -> Step:
    from mlx_distill.report import run as reporting

    config = recipe.report
    folder = layout.ComparisonFolder(config.comparison)
    written = [path for path in (folder.report, folder.results, folder.pipeline) if path in reporting.outputs(config)]
    charts = [folder.chart(name) for name in reporting.CHARTS if folder.chart(name).exists()]
    run = layout.RunFolder(recipe.compare.run)
    return Step(
        "report",
        config,
        folder.root,
        [*reporting.inputs(config), run.record, run.metrics],
        [*written, *charts],
        reporting.CODE_FORMAT,
        lambda progress: reporting.report(config, progress),
    )
