"""The cases of a SQL task: one script each, and the rows that a table written for people stands for.

A script makes the tables, runs the answer, and may then look at what the answer changed. Marks that the answer cannot
know stand between these parts of the output, so that an answer which swallows what follows it is found out.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_QUERY = re.compile(r"\s*(?:--.*\n\s*)*(?:SELECT|WITH|INSERT|UPDATE|DELETE|REPLACE|CREATE)\b", re.IGNORECASE)
_NO_PARSE = re.compile(r"syntax error|incomplete input|unrecognized token")

Row = tuple[str, ...]


def looks_like_sql(text: str) -> bool:
    """Whether a text without any fence begins as a statement does."""
    return _QUERY.match(text) is not None


def does_not_parse(problem: str) -> bool:
    """Whether SQLite's error message says that it could not read a statement."""
    return _NO_PARSE.search(problem) is not None


def script(setup: str, answer: str, check: str, marks: tuple[str, str]) -> str:
    """The script of one case.

    Args:
        setup: Tables and rows.
        answer: Statements that nobody has read.
        check: A query on what they left; "" where their own rows are wanted.
        marks: Printed before and after the answer.
    """
    # On a line of its own: the answer may end in a comment, or without a semicolon.
    first, second = (f"SELECT '{mark}';" for mark in marks)
    return f"{setup}\n;{first}\n{answer}\n;{second}\n{check}"


def rows_between(output: str, marks: tuple[str, str], *, after: bool) -> list[Row] | None:
    """The rows that a script printed between its marks, or after the second; None where a mark is missing."""
    lines = output.removesuffix("\n").split("\n")
    if marks[0] not in lines or marks[1] not in lines:
        return None
    first, second = lines.index(marks[0]), lines.index(marks[1])
    found = lines[second + 1 :] if after else lines[first + 1 : second]
    return [tuple(line.split("\t")) for line in found]


def read_rows(table: str) -> list[Row]:
    """The rows of a table such as `Ada | 3`, one a line; blank lines are none."""
    return [tuple(cell.strip() for cell in line.split("|")) for line in table.splitlines() if line.strip()]


def same_rows(found: Sequence[Row], expected: Sequence[Row], *, ordered: bool) -> bool:
    """Whether two results are the same: numbers by value to nine digits, all else by its text.

    Args:
        ordered: Whether the order of the rows matters.
    """
    if len(found) != len(expected):
        return False
    if not ordered:
        found, expected = sorted(found, key=_sorting), sorted(expected, key=_sorting)
    return all(
        len(one) == len(other) and all(map(_same, one, other)) for one, other in zip(found, expected, strict=True)
    )


def _sorting(row: Row) -> list[tuple[int, float, str]]:
    # Rounded, so that two numbers that count as the same are not sorted by their difference.
    numbers = [_number(cell) for cell in row]
    return [
        (1, 0.0, cell) if number is None else (0, float(f"{number:.9g}"), "")
        for cell, number in zip(row, numbers, strict=True)
    ]


def _same(one: str, other: str) -> bool:
    first, second = _number(one), _number(other)
    if first is None or second is None:
        return one == other
    return math.isclose(first, second, rel_tol=1e-9, abs_tol=1e-12)


def _number(cell: str) -> float | None:
    # Nothing but digits, sign, point and exponent: float() also takes "nan", "1_000" and blanks.
    if len(cell) > 40 or not re.fullmatch(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", cell):
        return None
    return float(cell)
