"""A local teacher's distribution over its held-out answers, to see how far models are from it.

A teacher that is not asked for answers is looked for on this machine alone: no model is downloaded to be measured
against. It reads the answers by itself, and is let go before another model is loaded. Whatever is in the way is said,
and the measure left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill.agreement import ProbeRow
from mlx_distill.batches import Batch, TeacherBuckets
from mlx_distill.config import DEFAULT_TOP_K, CompareConfig
from mlx_distill.errors import MlxDistillError
from mlx_distill.logit_source import known_words
from mlx_distill.models.resolve import resolve, resolve_here
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.progress import Progress
from mlx_distill.run_records import RunRecord
from mlx_distill.scores import HeldOutLoss
from mlx_distill.vocabulary import differing_words

_MLX = "mlx:"
_LEFT_OUT = "the divergence from the teacher is left out."


@dataclass(frozen=True)
class Source:
    """Whose distribution is sought, and the model where it can be read.

    Attributes:
        spec: Of the model; None where no local teacher is known, or none is wanted.
        folder: In Hugging Face layout; None where it is not here, or has another tokenizer than the student.
        teacher: MODEL@REVISION, where there is a folder.
        top_k: Words named at each position.
    """

    spec: str | None = None
    folder: Path | None = None
    teacher: str | None = None
    top_k: int = DEFAULT_TOP_K

    def holds(self, row: HeldOutLoss) -> bool:
        """Whether a row of an earlier call need not be read again."""
        return self.folder is None or (row.teacher, row.top_k) == (self.teacher, self.top_k)

    def fitting(self, row: HeldOutLoss) -> HeldOutLoss:
        """A row that holds, without what it says of another teacher.

        Where the teacher is not here now, what was measured when it was stays.
        """
        if row.teacher is None or row.teacher.rpartition("@")[0] == self.spec:
            return row
        return row.model_copy(update={"divergence": None, "teacher": None, "top_k": None})


@dataclass(frozen=True)
class Distribution:
    """What a teacher says of rows.

    Attributes:
        teacher: MODEL@REVISION.
        top_k: Words named at each position, or all of a smaller vocabulary.
        buckets: At the positions of each row, by the hash of its tokens.
    """

    teacher: str
    top_k: int
    buckets: Mapping[str, TeacherBuckets]


def source_of(config: CompareConfig, run: RunRecord, student: Path, progress: Progress) -> Source:
    """The local teacher of a comparison, or else the one that the run was distilled from.

    Args:
        student: Folder of the base, whose tokenizer the teacher must share.
    """
    if config.divergence == "off":
        return Source()
    named = config.teacher.removeprefix(_MLX) if config.teacher and config.teacher.startswith(_MLX) else None
    spec = named or run.distilled_from
    if spec is None:
        return Source()
    try:
        # One that is asked for answers is fetched in any case.
        model = resolve(spec, progress=progress) if named else resolve_here(spec, progress=progress)
        if model is None:
            progress.say(f"{spec} is not on this machine: {_LEFT_OUT}")
            return Source(spec)
        folder = Path(model.path)
        if (how := differing_words(load_tokenizer(folder), load_tokenizer(student))) is not None:
            progress.say(f"{spec} and the student do not have the same tokenizer ({how}): {_LEFT_OUT}")
            return Source(spec)
    except (MlxDistillError, OSError) as error:
        reason = error.message if isinstance(error, MlxDistillError) else error
        progress.say(f"{spec} cannot be read ({reason}): {_LEFT_OUT}")
        return Source(spec)
    return Source(spec, folder, f"{spec}@{(model.revision or 'folder')[:12]}")


def read_teacher(source: Source, rows: Mapping[str, ProbeRow], progress: Progress) -> Distribution | None:
    """Have the teacher read rows. One position takes half a kB.

    Args:
        rows: By the hash of their tokens.

    Returns:
        None where there is no teacher to read them, or it does not load; that is said.
    """
    if source.folder is None or source.teacher is None or not rows:
        return None
    from mlx_distill.backends.mlx.device import explained_allocation
    from mlx_distill.backends.mlx.teaching import LogitTeacher

    buckets: dict[str, TeacherBuckets] = {}
    try:
        with explained_allocation("Leave it out:  --divergence off"):
            with progress.task(f"Loading {source.spec}, the teacher"):
                known = known_words(load_tokenizer(source.folder), source.folder)
                model: Any = LogitTeacher(source.folder, dtype="auto", known=known)
            top_k = min(source.top_k, model.words)
            with progress.task("The teacher reads its held-out answers", len(rows)) as bar:
                for sha256, row in rows.items():
                    buckets[sha256] = model.likeliest(_alone(row), top_k)
                    bar.advance()
    except MlxDistillError as error:
        progress.say(f"{source.spec} cannot be read ({error.message}): {_LEFT_OUT}")
        return None
    return Distribution(source.teacher, source.top_k, buckets)


def _alone(row: ProbeRow) -> Batch:
    """A row as a batch of its own, without padding: base and student read it so, too."""
    tokens = np.array([row.tokens], np.int32)
    mask = np.zeros(tokens.shape, np.bool_)
    mask[0, np.array(row.positions) + 1] = True
    return Batch(tokens, mask, np.array([tokens.shape[1]], np.int32), np.zeros(1, np.int32))
