"""Finds texts that say the same as an earlier one, exactly or nearly, among up to some hundred thousand.

Two texts are duplicates if they are equal once case and white space are folded; or if their sets of shingles, all
runs of 8 bytes of the folded text, have a Jaccard similarity of at least the threshold, and their lengths are as
close (a set does not know how often a text repeats itself). Candidates come from MinHash signatures in a banded
index (Broder 1997; Indyk and Motwani 1998), through the library rensa, and every one is then compared by its true
sets: no text is dropped on an estimate. A true duplicate is overlooked with a probability below one in a thousand, or
where more than `_MOST_COMPARED` earlier texts look about as similar.

The default threshold is measured on the prompts that ship with the package: a variation of a prompt reaches 0.85
with its base and must stay, while a text of 350 characters with one word changed has 0.92. Answers to variations of
one prompt stay below 0.46.

Not found: what says the same in other words, and a short text inside a much longer one.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash, RMinHashLSH

from mlx_distill.errors import ConfigError
from mlx_distill.prompts import fold

DEFAULT_THRESHOLD = 0.9

_SHINGLE_BYTES = 8
_SIGNATURE = 256
_SEED = 1
#: Candidates compared in full for one text; beyond it only those that look most similar are.
_MOST_COMPARED = 8
#: Chance that a pair right at the threshold shares no band, or that its estimate is as far off as the margin.
_MISS = 1e-3
_MARGIN_DEVIATIONS = 3.5
#: Shingle sets kept for comparisons, 32 kB each for a text of 4 kB.
_SETS_KEPT = 512


def near_duplicates(texts: Mapping[str, str], *, threshold: float = DEFAULT_THRESHOLD) -> dict[str, str]:
    """Which texts to drop as duplicates of one that stays. The first in order stays; the same call gives the same.

    A text is compared with those that stay alone, so that a chain of small changes does not drop its far end.
    It takes about half a millisecond for 4 kB of text on a quiet core, and besides the texts 4 kB of memory for each
    that stays. Where all texts are nearly duplicates, such as 20,000 that share their first 85 %, time grows with the
    square of their number, and they take minutes.

    Args:
        texts: By id, in the order that decides which of two stays. Empty texts are equal to one another.
        threshold: Jaccard similarity of the shingle sets from which two texts are duplicates, in (0, 1].

    Returns:
        Id of each text to drop → id of the text that stays in its stead.

    Raises:
        ConfigError: The threshold is not in (0, 1].
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"near-duplicate threshold {threshold:g} is not above 0 and at most 1.")
    ids = list(texts)
    first_of: dict[bytes, int] = {}
    dropped: dict[str, str] = {}
    index = _Index(threshold)

    @lru_cache(_SETS_KEPT)
    def shingles_of(place: int) -> NDArray[np.uint64]:
        return shingles(texts[ids[place]])

    for place, (identity, text) in enumerate(texts.items()):
        folded = _encoded(text)
        same = first_of.setdefault(blake2b(folded, digest_size=16).digest(), place)
        if same != place:
            # The first of them may itself be a near duplicate.
            dropped[identity] = dropped.get(ids[same], ids[same])
            continue
        signature = RMinHash(_SIGNATURE, _SEED)
        signature.update(_runs(folded).view(f"V{_SHINGLE_BYTES}").tolist())
        for kept in index.like(signature, len(folded)):
            if jaccard(shingles_of(place), shingles_of(kept)) >= threshold:
                dropped[identity] = ids[kept]
                break
        else:
            index.add(place, signature, len(folded))
    return dropped


def shingles(text: str) -> NDArray[np.uint64]:
    """The shingle set that two texts are compared by: (S,) sorted, no value twice.

    A shingle's bytes are read as a number; nothing is hashed, so that different shingles are different numbers. A
    text shorter than a shingle, padded, is its own.
    """
    runs: NDArray[np.uint64] = np.sort(_runs(_encoded(text)))
    first: NDArray[np.bool_] = np.append(True, runs[1:] != runs[:-1])
    distinct: NDArray[np.uint64] = runs[first]
    return distinct


def jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """Shared elements over all elements of two sets as `shingles` makes them."""
    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)


def _encoded(text: str) -> bytes:
    return fold(text).encode(errors="surrogatepass")


def _runs(folded: bytes) -> NDArray[np.uint64]:
    data = np.frombuffer(folded.ljust(_SHINGLE_BYTES, b"\0"), dtype=np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(data, _SHINGLE_BYTES)
    return np.ascontiguousarray(windows).view("<u8").ravel()


def bands_for(threshold: float) -> int:
    """The fewest bands of the signature by which a pair at the threshold is missed with a probability below `_MISS`.

    A pair of similarity s shares all r = `_SIGNATURE` / b rows of one of b bands with probability 1 - (1 - s^r)^b.
    """
    for bands in (16, 32, 64, 128):
        if (1 - threshold ** (_SIGNATURE // bands)) ** bands < _MISS:
            return bands
    return _SIGNATURE


class _Index:
    """Signatures of the texts that stay."""

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._banded = RMinHashLSH(threshold, _SIGNATURE, bands_for(threshold))
        self._places: list[int] = []
        self._sizes: NDArray[np.int64] = np.empty(1024, dtype=np.int64)
        # A byte of each value is enough to compare by.
        self._rows: NDArray[np.uint8] = np.empty((1024, _SIGNATURE), dtype=np.uint8)

    def add(self, place: int, signature: RMinHash, size: int) -> None:
        row = len(self._places)
        if row == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
            self._sizes = np.concatenate([self._sizes, np.empty_like(self._sizes)])
        self._rows[row], self._sizes[row] = _low_bytes(signature), size
        self._places.append(place)
        self._banded.insert(row, signature)

    def like(self, signature: RMinHash, size: int) -> list[int]:
        """Places of the texts that may be duplicates of one of this size in bytes, the first in order first."""
        own = _low_bytes(signature)
        rows = np.array(sorted(set(self._banded.query(signature))), dtype=np.int64)
        sizes = self._sizes[rows]
        rows = rows[np.minimum(sizes, size) >= self._threshold * np.maximum(sizes, size)]
        # Where all texts share a long beginning, most rows fall at the first glance, at a quarter of the signature.
        for width in (_SIGNATURE // 4, _SIGNATURE):
            equal = np.count_nonzero(self._rows[rows, :width] == own[:width], axis=1)
            margin = _MARGIN_DEVIATIONS * sqrt(self._threshold * (1 - self._threshold) / width)
            likely = equal >= (self._threshold - margin) * width
            rows, equal = rows[likely], equal[likely]
        if len(rows) > _MOST_COMPARED:
            rows = np.sort(rows[np.argsort(-equal, kind="stable")[:_MOST_COMPARED]])
        return [self._places[row] for row in rows]


def _low_bytes(signature: RMinHash) -> NDArray[np.uint8]:
    return np.array(signature.digest(), dtype=np.uint32).astype(np.uint8)
