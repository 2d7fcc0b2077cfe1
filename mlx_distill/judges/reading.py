"""Reads what a judging model replied: one JSON object of the form asked for, and nothing else."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from pydantic import ValidationError

from mlx_distill.layout import explain
from mlx_distill.records import Record, Reply

R = TypeVar("R", bound=Record)

_FENCED = re.compile(r"\A```(?:json)?[ \t]*\n(.*?)\n?```\Z", re.DOTALL)
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]+")
_MOST_OF_A_PROBLEM = 300


class UnreadableError(ValueError):
    """A reply that is not what was asked for.

    Args:
        problem: What is wrong with it; may hold words of the reply.
        reason: The same in words of ours alone, fit to be told to the judge.
        final: Whether asking again would be of no use.
    """

    def __init__(self, problem: str, *, reason: str, final: bool = False) -> None:
        super().__init__(_UNPRINTABLE.sub(" ", problem)[:_MOST_OF_A_PROBLEM])
        self.reason = reason
        self.final = final


def read_object(reply: Reply, record: type[R]) -> R:
    """Read a record out of a reply: one JSON object, bare or in one code fence, with nothing else.

    Raises:
        UnreadableError: It is not that.
    """
    if reply.stop == "refusal":
        raise UnreadableError("the judge refused to answer", reason="it was a refusal", final=True)
    if reply.stop == "length":
        raise UnreadableError("the judge's reply was cut at its token limit", reason="it was cut; be brief")
    if reply.stop != "end":
        why = reply.stop_reason or reply.stop
        raise UnreadableError(f"the judge's reply is not whole: it stopped for {why}", reason="it was not whole")
    text = reply.text.strip()
    if fenced := _FENCED.match(text):
        text = fenced[1]
    try:
        return record.model_validate(json.loads(text, object_pairs_hook=_without_duplicates))
    except ValidationError as error:
        problem = f"the judge's reply does not have the form asked for: {explain(error)}"
        raise UnreadableError(problem, reason="it does not have the form asked for") from None
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"the judge's reply is not JSON: {error}", reason="it is not JSON") from None


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found
