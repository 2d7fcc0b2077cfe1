"""Who answers: teacher, base and distilled student, and whatever else is named."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_distill import layout
from mlx_distill.config import CompareConfig
from mlx_distill.errors import ConfigError
from mlx_distill.models.resolve import resolve
from mlx_distill.progress import Progress
from mlx_distill.records import CONTENDER_PATTERN, CONTENDERS
from mlx_distill.run_records import RunRecord
from mlx_distill.runs import FusedRecord, read_fused, read_run
from mlx_distill.teachers.registry import TEACHERS, base_urls

#: What a spec of a local model may begin with: the student's own backend answers for it, not a teacher's.
_LOCAL = "mlx:"


@dataclass(frozen=True)
class LocalContender:
    """A model that answers on this machine.

    Attributes:
        name: Of the contender.
        model: Its identity: answers of another are not its own.
        folder: In Hugging Face layout.
    """

    name: str
    model: str
    folder: Path


@dataclass(frozen=True)
class AskedContender:
    """A teacher that is asked through a ledger.

    Attributes:
        name: Of the contender.
        model: Its spec.
        base_url: Of the server that it is behind, where one was named.
    """

    name: str
    model: str
    base_url: str | None = None


Contending = LocalContender | AskedContender


def contenders_of(config: CompareConfig, run: RunRecord, fused: FusedRecord, progress: Progress) -> list[Contending]:
    """All who answer, in the order of display.

    Raises:
        ConfigError: What names the others cannot be read.
        InputError, ModelError: One of them is not there.
    """
    named = list(parse_others(config.others))
    asked = {} if config.teacher is None else {"teacher": config.teacher}
    asked |= {name: spec for name, spec in named if _is_asked(spec)}
    urls = base_urls(asked.values(), config.base_url, what="contenders")
    found: list[Contending] = [AskedContender("teacher", spec, urls[spec]) for spec in filter(None, [config.teacher])]
    found.append(_model("base", run.model.spec, progress))
    found.append(_fused("distilled", config.run, fused, config.fused or layout.RunFolder(config.run).fused))
    for name, spec in named:
        found.append(AskedContender(name, spec, urls[spec]) if name in asked else _local(name, spec, progress))
    return found


def parse_others(text: str) -> Iterator[tuple[str, str]]:
    """The (name, spec) pairs of "NAME=SPEC,NAME=SPEC".

    Raises:
        ConfigError: A part is none, or a name is taken.
    """
    seen = set(CONTENDERS)
    for part in filter(None, map(str.strip, text.split(","))):
        name, _, spec = (piece.strip() for piece in part.partition("="))
        if not (spec and re.fullmatch(CONTENDER_PATTERN, name)):
            raise ConfigError(
                f"--others: {part!r} is not NAME=SPEC.",
                hint="For example  --others earlier=adapters/earlier,big=Qwen/Qwen2.5-7B-Instruct  "
                "(letters, digits, . _ - in a name).",
            )
        if name in seen:
            raise ConfigError(f"--others: the name {name!r} is taken.", hint="Give it another.")
        seen.add(name)
        yield name, spec


def _is_asked(spec: str) -> bool:
    """Whether a spec names a teacher that is asked, and not a model or a run's folder."""
    provider, colon, _ = spec.partition(":")
    return bool(colon) and provider in TEACHERS and not spec.startswith(_LOCAL)


def _local(name: str, spec: str, progress: Progress) -> LocalContender:
    path = Path(spec).expanduser()
    files = layout.RunFolder(path)
    if files.record.exists():
        read_run(path)
        return _fused(name, path, read_fused(files.fused, path), files.fused)
    return _model(name, spec.removeprefix(_LOCAL), progress)


def _model(name: str, spec: str, progress: Progress) -> LocalContender:
    model = resolve(spec, progress=progress)
    return LocalContender(name, f"{model.name}@{(model.revision or 'folder')[:12]}", Path(model.path))


def _fused(name: str, run: Path, fused: FusedRecord, folder: Path) -> LocalContender:
    # The same adapter in a base that was quantized again is another model.
    way = "" if fused.check is None or fused.check.way == "plain" else f"-{fused.check.way}"
    return LocalContender(name, f"{run.resolve().name}{way}@{fused.adapter_sha256[:12]}", folder)
