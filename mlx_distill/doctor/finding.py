"""What every probe answers with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: "warning" is there, but slow, scarce or not as it should be; "missing" is not there.
State = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Finding:
    """One row.

    Attributes:
        name: Of the thing.
        state: Whether it is there and good.
        found: What is there, in words; of a key only "set" or "not set".
        remedy: The command that brings or mends it, or what to do; None where nothing is to be done.
        required: Whether nothing works without it.
    """

    name: str
    state: State
    found: str
    remedy: str | None = None
    required: bool = False
