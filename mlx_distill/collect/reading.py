"""What entries of the ledger say, looked up one at a time: there may be more than memory holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from mlx_distill.ledger import Entry, Ledger

T = TypeVar("T")


class FromLedger(Mapping[str, T]):
    """Something of each entry by its key.

    Args:
        keys: In their order.
        look: What is wanted of an entry.
    """

    def __init__(self, ledger: Ledger, keys: Sequence[str], look: Callable[[Entry], T]) -> None:
        self._ledger = ledger
        self._keys = keys
        self._look = look

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __getitem__(self, key: str) -> T:
        entry = self._ledger.entry(key)
        if entry is None:
            raise KeyError(key)
        return self._look(entry)


def whole(entry: Entry) -> Entry:
    """The entry."""
    return entry


def prompt(entry: Entry) -> str:
    """All that was asked."""
    return "\n\n".join(message.content or "" for message in entry.request.messages)


def answer(entry: Entry) -> str:
    """What came back; nothing where nothing did."""
    return entry.reply.text if entry.reply is not None else ""


def row(entry: Entry) -> str:
    """Both."""
    return f"{prompt(entry)}\n\n{answer(entry)}"
