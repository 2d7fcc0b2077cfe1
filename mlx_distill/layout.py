"""The safe ways to write, read and lock files; their names are in `folders`.

A file is written to a temporary name beside it, fsynced, then renamed: a reader sees the old content or the new, never
half. Rows that arrive one at a time are appended and fsynced; half a last line, left by a crash, is dropped on reading.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from mlx_distill import locks
from mlx_distill.errors import FolderError, InputError, ResourceError
from mlx_distill.folders import (
    SPLITS,
    BenchFolder,
    ComparisonFolder,
    DataFolder,
    RunFolder,
    export_record,
    fused_record,
    logits_record,
    pruned_record,
    stamp,
)

__all__ = [
    "SPLITS",
    "BenchFolder",
    "ComparisonFolder",
    "DataFolder",
    "RunFolder",
    "export_record",
    "fused_record",
    "logits_record",
    "pruned_record",
    "stamp",
]

R = TypeVar("R", bound=BaseModel)

#: Each folder that is written to is held by it.
lock = locks.lock

#: Names of what is being written, and of a folder on its way out; `tempfile` adds eight characters.
_PART, _OLD = ".part-", ".old-"
_TEMPORARY = re.compile(r"\.(?P<name>.+)(?P<kind>\.part-|\.old-)[a-z0-9_]{8}(\.\w+)?")


def models_cache() -> Path:
    """Where converted models are kept: `$MLX_DISTILL_CACHE`, else the user's cache folder."""
    if root := os.environ.get("MLX_DISTILL_CACHE"):
        return Path(root).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "mlx-distill"


def bundled(relative: str) -> Path | None:
    """A file or folder of `data/` that ships with the package, such as "prompts/coding.toml"."""
    package = Path(str(resources.files("mlx_distill")))
    for root in (package / "_data", package.parent / "data"):
        if (root / relative).exists():
            return root / relative
    return None


def find_input(path: Path) -> Path:
    """A user's path as it is; or, where nothing is there and it names shipped data, the shipped copy."""
    path = path.expanduser() if path.parts[:1] == ("~",) else path
    if not path.exists() and path.parts[:1] == ("data",):
        return bundled(str(Path(*path.parts[1:]))) or path
    return path


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is fsynced and takes its name.

    Raises:
        ResourceError: It cannot be written, as on a full disk. `path` keeps its old content.
        FolderError: Something other than a file is there, such as a folder or a device, which must not be replaced.
    """
    temporary: Path | None = None
    try:
        if path.exists() and not path.is_file():
            raise FolderError(f"{path} exists and is not a file.", hint="Choose another path.")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}{_PART}", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _disk_error(error, path) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file, atomically, as UTF-8."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success it replaces `path` as a whole.

    A process killed between the two renames leaves neither; `sweep` then brings the old folder back.

    Raises:
        ResourceError: It cannot be written. `path` is as it was.
    """
    temporary: Path | None = None
    retired: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}{_PART}"))
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        temporary.chmod(0o755)
        if path.exists():
            retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}{_OLD}"))
            path.rename(retired / path.name)
        temporary.rename(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _disk_error(error, path) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if retired is not None:
            _retire(retired, path)


def _retire(retired: Path, path: Path) -> None:
    """Remove a folder on its way out; or bring it back, where nothing has taken its place."""
    if not path.exists() and (retired / path.name).exists():
        (retired / path.name).rename(path)
    shutil.rmtree(retired, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Clean up what a killed process left of `atomic_file` and `atomic_folder` in a folder.

    Only for a holder of the lock under which such files are written there: it cannot tell a living writer's from a
    dead one's.
    """
    for path in folder.glob(".*"):
        match = _TEMPORARY.fullmatch(path.name)
        if match and match["kind"] == _OLD:
            _retire(path, folder / match["name"])
        elif match and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif match:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def explained_disk(path: Path) -> Iterator[None]:
    """While open, an error of the disk is one of ours.

    Raises:
        ResourceError: It cannot be written, as on a full disk.
    """
    try:
        yield
    except OSError as error:
        raise _disk_error(error, path) from error


def append_row(path: Path, row: BaseModel) -> None:
    """Append one record to a JSONL file and fsync it.

    Raises:
        ResourceError: It cannot be written. The file is as it was.
    """
    line = (row.model_dump_json(exclude_none=True) + "\n").encode()
    try:
        # Not buffered: a buffer that could not be written would be tried again on closing.
        with path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                written = 0
                while written < len(line):
                    written += file.write(line[written:])
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise _disk_error(error, path) from error


def drop_torn_line(path: Path) -> None:
    """Cut a half-written last line, which a crash between write and fsync can leave, off a JSONL file."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def read_rows(path: Path, record: type[R]) -> list[R]:
    """All records of a JSONL file of ours; none if it does not exist.

    Raises:
        InputError: The file cannot be read, or a whole line is not such a record; says which line and why.
    """
    rows: list[R] = []
    try:
        # As bytes: a crash can tear a line within a character.
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    rows.append(record.model_validate_json(line))
                except ValidationError as error:
                    raise InputError(explain(error), path=path, line=number) from None
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}.", path=path) from None
    return rows


def read_record(path: Path, record: type[R], *, hint: str | None = None) -> R:
    """The one record that a JSON file of ours holds.

    Raises:
        InputError: It is missing, or is not such a record.
    """
    try:
        return record.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such file.", path=path, hint=hint) from None
    except (ValidationError, UnicodeDecodeError) as error:
        detail = explain(error) if isinstance(error, ValidationError) else str(error)
        raise InputError(detail, path=path, hint=hint) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}.", path=path, hint=hint) from None


def explain(error: ValidationError) -> str:
    """The first problem of a pydantic error, in one line."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"])
    return f"{where}: {problem['msg']}" if where else problem["msg"]


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_disk(folder: Path, needed: int, *, what: str) -> None:
    """Refuse work whose result would not fit.

    Args:
        needed: In bytes.

    Raises:
        ResourceError: Says how much is needed and how much is free.
    """
    at = folder
    while not at.exists():
        at = at.parent
    free = shutil.disk_usage(at).free
    if free < needed:
        raise ResourceError(
            f"{what} needs {needed / 1e9:.1f} GB on the disk of {folder}, and {free / 1e9:.1f} GB are free.",
            hint="Free some space, or choose a folder on another disk.",
        )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_error(error: OSError, path: Path) -> ResourceError:
    # What failed can be another file, read while this one was written.
    failed = Path(os.fsdecode(error.filename or path))
    what = str(error.strerror or error) + (f" ({failed})" if failed.absolute().parent != path.absolute().parent else "")
    return ResourceError(f"{path} could not be written: {what}.", hint="What was there before is unchanged.")
