"""Which requests a collection makes: one or several a prompt, and a longer one where the answer to it was cut.

An answer cut by its token limit is asked again with twice the limit, up to a ceiling. Each limit makes a request of
its own, with its own row in the ledger: nothing is overwritten, and the history of a prompt follows from the ledger
and the settings alone, whenever a run was left. The samples of a prompt are requests of their own in the same way, and
each is told from the others by its number: more of them later leave those that are there as they are.

Requests are made when they are looked at, and few are held at a time: a collection may have millions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import overload

from mlx_distill.ledger import Entry, Ledger, Standing
from mlx_distill.records import Message, Prompt, Request, StopReason

#: Requests held at a time.
_CHUNK = 500


class PromptRequests(Sequence[Request]):
    """The first request of every sample of every prompt: prompt by prompt, the samples of each in order.

    Args:
        teacher: As `Request.teacher` names it.
        system: System text of prompts that have none of their own.
        samples: Answers to each prompt.
        temperature: That they are drawn with; None leaves it to the teacher.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        teacher: str,
        system: str | None,
        max_tokens: int,
        samples: int = 1,
        temperature: float | None = None,
    ) -> None:
        self._prompts = prompts
        self._teacher = teacher
        self._system = system
        self._max_tokens = max_tokens
        self._samples = samples
        self._temperature = temperature

    def __len__(self) -> int:
        return len(self._prompts) * self._samples

    @overload
    def __getitem__(self, index: int) -> Request: ...
    @overload
    def __getitem__(self, index: slice) -> list[Request]: ...
    def __getitem__(self, index: int | slice) -> Request | list[Request]:
        places = range(len(self))[index]
        return [self._at(place) for place in places] if isinstance(places, range) else self._at(places)

    def __iter__(self) -> Iterator[Request]:
        return map(self._at, range(len(self)))

    def _at(self, place: int) -> Request:
        number, sample = divmod(place, self._samples)
        prompt = self._prompts[number]
        return Request(
            prompt_id=prompt.id,
            family=prompt.family,
            teacher=self._teacher,
            messages=(Message(role="user", content=prompt.text),),
            system=prompt.system or self._system or None,
            max_tokens=self._max_tokens,
            sample=sample,
            temperature=self._temperature,
        )


def samples_in(requests: Sequence[Request]) -> int:
    """How many samples of each prompt there are among requests in the order of `PromptRequests`."""
    return requests[-1].sample + 1 if requests else 1


def longer(request: Request, stop: StopReason | None, ceiling: int) -> Request | None:
    """What is asked after an answer that stopped for this reason; None where that stands.

    Args:
        ceiling: Highest token limit.
    """
    if stop != "length" or request.max_tokens >= ceiling:
        return None
    return request.model_copy(update={"max_tokens": min(2 * request.max_tokens, ceiling)})


def limits(max_tokens: int, ceiling: int) -> list[int]:
    """Every token limit that a prompt can come to be asked with."""
    found = [max_tokens]
    while found[-1] < ceiling:
        found.append(min(2 * found[-1], ceiling))
    return found


def outstanding(ledger: Ledger, requests: Iterable[Request], ceiling: int, *, failed: bool = True) -> Iterator[Request]:
    """The request of every sample that is to be sent now. The ledger is only read.

    Args:
        requests: As `PromptRequests` has them.
        ceiling: Highest token limit.
        failed: Whether those that failed are to be sent again.
    """
    for chunk in _chunks(requests):
        for request, standing in _latest(ledger, chunk, ceiling):
            if standing is None or (standing.to_send and (failed or standing.state != "failed")):
                yield request


def plan(ledger: Ledger, requests: Iterable[Request]) -> None:
    """Enter the first request of every sample; known ones take over the prompt id and family they have now."""
    for chunk in _chunks(requests):
        ledger.plan(chunk)


def planned(ledger: Ledger, requests: Iterable[Request]) -> Iterator[Request]:
    """The same requests, each entered in the ledger before it comes out."""
    for chunk in _chunks(requests):
        ledger.plan(chunk)
        yield from chunk


def histories(ledger: Ledger, requests: Iterable[Request], ceiling: int) -> Iterator[list[Entry]]:
    """For every sample what was asked for it, in order; the last entry is the one that counts."""
    for chunk in _chunks(requests):
        found: list[list[Entry]] = [[] for _ in chunk]
        asked = dict(enumerate(chunk))
        while asked:
            entries = {entry.request.key: entry for entry in ledger.entries(r.key for r in asked.values())}
            further: dict[int, Request] = {}
            for place, request in asked.items():
                entry = entries.get(request.key)
                if entry is None:
                    continue
                found[place].append(entry)
                if (then := longer(entry.request, entry.reply.stop if entry.reply else None, ceiling)) is not None:
                    further[place] = then
            asked = further
        yield from (history for history in found if history)


def _latest(ledger: Ledger, requests: list[Request], ceiling: int) -> list[tuple[Request, Standing | None]]:
    open_places = list(range(len(requests)))
    now = list(requests)
    standings: list[Standing | None] = [None] * len(requests)
    while open_places:
        looked_up = ledger.standings(now[place].key for place in open_places)
        further: list[int] = []
        for place, (_, standing) in zip(open_places, looked_up, strict=True):
            standings[place] = standing
            if standing is not None and (then := longer(now[place], standing.stop, ceiling)) is not None:
                now[place] = then
                further.append(place)
        open_places = further
    return list(zip(now, standings, strict=True))


def _chunks(requests: Iterable[Request]) -> Iterator[list[Request]]:
    iterator = iter(requests)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk
