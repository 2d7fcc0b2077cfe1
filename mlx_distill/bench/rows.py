"""The rows of a bench: the user's own, or the starter answers, at lengths spread over all that there are."""

from __future__ import annotations

import json
from pathlib import Path

from mlx_distill.errors import InputError
from mlx_distill.layout import DataFolder, bundled
from mlx_distill.teachers.recorded import Recording, recordings

#: Characters that `--quick` leaves of an answer: some thirty tokens.
_SHORT = 100


def write_rows(folder: Path, data: Path | None, *, count: int, short: bool) -> None:
    """Write `train.jsonl` into a folder.

    Args:
        data: Folder of the user's rows; None for the starter answers.
        count: Rows to take, spread evenly over all by their size; some are taken again where there are too few.
        short: Whether to cut the starter's answers, and take the shortest rows.

    Raises:
        InputError: There are no rows.
    """
    lines = _starter(short=short) if data is None else _own(data)
    lines.sort(key=len)
    if short and data is None:
        lines = lines[: max(count, len(lines) // 4)]
    chosen = [lines[round((len(lines) - 1) * (at + 0.5) / count)] for at in range(count)]
    folder.mkdir(parents=True, exist_ok=True)
    DataFolder(folder).split("train").write_text("".join(f"{line}\n" for line in chosen), encoding="utf-8")


def _own(data: Path) -> list[str]:
    path = DataFolder(data).split("train")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(
            "no such file.", path=path, hint="Give the folder of a data set, or leave --data out."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}.", path=path) from None
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise InputError("it is empty.", path=path, hint="Give another data set, or leave --data out.")
    return lines


def _starter(*, short: bool) -> list[str]:
    folder = bundled("starter/answers")
    assert folder is not None
    return [_row(recording, short=short) for recording in recordings(folder)]


def _row(recording: Recording, *, short: bool) -> str:
    answer = recording.answer.strip()
    turns = [*recording.conversation, ("assistant", answer[:_SHORT] if short else answer)]
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]})
