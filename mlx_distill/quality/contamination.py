"""Finds prompts that come too close to a held-out prompt: training on them would spoil a later comparison.

Two prompts are compared by their content words: case and punctuation are folded, and the words that nearly every
request for code has ("write a Python function that returns ...") are left out. A prompt is contaminated by a held-out
prompt if one of these holds:

1. it has at least `PAIRS_SHARED` of the held-out prompt's pairs of neighbouring content words: an edited copy, whatever
   stands before or after it;
2. the two sets of content words have a Jaccard similarity of at least `WORDS_ALIKE`: the same in another order;
3. at least `PART_SHARED` of its own pairs, and no fewer than `PART_PAIRS`, are in the held-out prompt: a part of it.

The numbers are measured on the prompts that ship with the package. The closest training prompt has 0.21 of a held-out
prompt's pairs and 0.21 of the words; the closest two tasks (a token bucket in Python and one in Java) have 0.27 and
0.38. A copy with a courtesy before it, an instruction after it and three words replaced keeps 0.5 of the pairs or more.

A verdict rests on the two prompts alone: adding others changes nothing. Not found: the same task in other words, in
another natural language, or with most of its nouns exchanged.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

PAIRS_SHARED = 0.45
WORDS_ALIKE = 0.6
PART_SHARED = 0.75
PART_PAIRS = 8

#: Below this many content words all words of a prompt are taken.
_FEWEST_WORDS = 3

# Scripts without blanks between words are compared by character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")

_EVERYWHERE = frozenset(
    _WORD.findall(
        """
    a an and any are as at be been both but by can could do does each either every for from has have how i if in into
    is it its let me more must my no nor not of on one only or other our own please same shall should so some such than
    that the their them then there these they this those to too us use used using via was we were what when where
    whether which while who why will with without would you your

    build class classes code create design develop example examples following function functions give given help
    implement implementation java kotlin make method methods named program programs provide python query return
    returning returns script show small simple sql take takes taking accept accepts called include write
    """
    )
)


@dataclass(frozen=True)
class _Reading:
    """What two prompts are compared by."""

    words: frozenset[str]
    pairs: frozenset[Hashable]

    @classmethod
    def of(cls, text: str) -> _Reading:
        everything = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
        content = [word for word in everything if word not in _EVERYWHERE]
        if len(content) < _FEWEST_WORDS:
            content = everything
        # A single word has no pair, and stands for itself.
        return cls(frozenset(content), frozenset(pairwise(content)) or frozenset(content))


def contaminated(prompts: Mapping[str, str], held_out: Mapping[str, str]) -> dict[str, str]:
    """Which prompts are too close to a held-out one.

    Time grows with the number of prompts times the held-out prompts that share a word with one; a hundred thousand
    prompts against a hundred take some seconds.

    Args:
        prompts: By id.
        held_out: By id.

    Returns:
        Id of each contaminated prompt → id of the held-out prompt that it is closest to, in the order of `prompts`.
    """
    names = list(held_out)
    readings = [_Reading.of(text) for text in held_out.values()]
    by_word = _index(reading.words for reading in readings)
    by_pair = _index(reading.pairs for reading in readings)
    found: dict[str, str] = {}
    for identity, text in prompts.items():
        own = _Reading.of(text)
        words, pairs = _shared(own.words, by_word), _shared(own.pairs, by_pair)
        best, closest = 0.0, None
        for place in sorted(words):
            score = _score(own, readings[place], words[place], pairs[place])
            if score > best:
                best, closest = score, place
        if closest is not None:
            found[identity] = names[closest]
    return found


def _score(own: _Reading, held_out: _Reading, words: int, pairs: int) -> float:
    """How far above the criterion a pair of prompts lies; 0 where none of its rules holds.

    Args:
        words: How many content words they share.
        pairs: How many pairs they share.
    """
    shared = pairs / len(held_out.pairs)
    alike = words / (len(own.words) + len(held_out.words) - words)
    part = pairs / len(own.pairs)
    holds = shared >= PAIRS_SHARED or alike >= WORDS_ALIKE or (part >= PART_SHARED and len(own.pairs) >= PART_PAIRS)
    return shared + alike + part if holds else 0.0


def _index(sets: Iterable[frozenset[Hashable]] | Iterable[frozenset[str]]) -> dict[Hashable, list[int]]:
    places: dict[Hashable, list[int]] = defaultdict(list)
    for place, members in enumerate(sets):
        for member in members:
            places[member].append(place)
    return dict(places)


def _shared(members: Iterable[Hashable], places: Mapping[Hashable, list[int]]) -> Counter[int]:
    return Counter(place for member in members for place in places.get(member, ()))
