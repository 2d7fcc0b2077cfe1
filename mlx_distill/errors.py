"""Every error a user can meet, drawn as one tree.

    MlxDistillError
    ├── ConfigError        (ValueError)     a recipe key, flag or value that cannot be
    ├── InputError         (ValueError)     a file or row that cannot be read as what it claims to be
    ├── ModelError         (ValueError)     a model that cannot be found, loaded or used
    ├── TeacherError       (RuntimeError)   a teacher that cannot be reached or refuses to answer
    │   └── TeacherUnavailableError         the same for every request to it, until the user acts
    ├── TrainingError      (RuntimeError)   a training run that cannot go on
    ├── FolderError        (RuntimeError)   an output folder that is in use or holds something else
    │   ├── InUseError                      the first of these: it will be free again
    │   └── OccupiedError                   the same, where it holds another result of the same kind
    ├── ResourceError      (RuntimeError)   too little disk or memory
    ├── IsolationError     (RuntimeError)   a program that cannot be run as safely as was asked
    └── DependencyError    (ImportError)    an optional package that is not installed

Each says what failed, where, and what to do next. The command line prints `str(error)` and exits 1;
foreign exceptions are translated into these once, at the boundary where they arise.
"""

from __future__ import annotations

from pathlib import Path


class MlxDistillError(Exception):
    """Root of the tree.

    Args:
        message: What failed, and where.
        hint: The next step, as a sentence or a command to type.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class ConfigError(MlxDistillError, ValueError):
    """A recipe key, flag or value that cannot be."""


class InputError(MlxDistillError, ValueError):
    """A file that is missing, empty, or not what it claims to be.

    Args:
        message: What is wrong.
        path: The file.
        line: Its line, counted from 1.
        hint: The next step.
    """

    def __init__(
        self,
        message: str,
        *,
        path: Path | str | None = None,
        line: int | None = None,
        hint: str | None = None,
    ) -> None:
        where = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(where + message, hint=hint)
        self.path = None if path is None else Path(path)
        self.line = line


class ModelError(MlxDistillError, ValueError):
    """A model that cannot be found, loaded or used for what was asked."""


class TeacherError(MlxDistillError, RuntimeError):
    """A teacher that cannot be reached, or refuses to work."""


class TeacherUnavailableError(TeacherError):
    """A teacher that will answer nothing until the user acts: no key, a refused key, a spend limit, no such model."""


class TrainingError(MlxDistillError, RuntimeError):
    """A training run that cannot go on."""


class FolderError(MlxDistillError, RuntimeError):
    """An output folder that another process uses, or that holds something else."""


class InUseError(FolderError):
    """A folder that another process works in; it will be free again."""


class OccupiedError(FolderError):
    """An output folder that holds another result of the kind that was to be written there."""


class ResourceError(MlxDistillError, RuntimeError):
    """Too little disk or memory for what was asked."""


class IsolationError(MlxDistillError, RuntimeError):
    """A program that cannot be run within the limits that were asked for."""


class DependencyError(MlxDistillError, ImportError):
    """An optional package is missing.

    Args:
        package: The import that failed.
        extra: The extra of mlx-distill that brings it.
    """

    def __init__(self, package: str, *, extra: str) -> None:
        super().__init__(f"{package} is not installed.", hint=f"Install it:  pip install 'mlx-distill[{extra}]'")
