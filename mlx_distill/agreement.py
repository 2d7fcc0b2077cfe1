"""Whether two models say the same: what each says of a few rows, and how far that is apart.

One model is held against another by what both give for the same `Probe`: the logits of some positions, and what each
answers greedily. Who computes writes an `Observation` to a folder, one model in memory at a time; `agreement` reads
two of them. So an adapter can be held against the model fused from it, and MLX against transformers or llama.cpp.

Writes: FOLDER/{logits.npy,greedy.json}, where it is told to.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from mlx_distill.records import Record
from mlx_distill.run_records import Agreement, ProbeSource

__all__ = ["Agreement", "Observation", "ObservationWriter", "Probe", "ProbeRow", "agreement"]

#: Positions read at once: of a vocabulary of 150,000, these take some 40 MB in float64.
_CHUNK = 32

_LOGITS = np.dtype("<f4")


class ProbeRow(Record):
    """A row to read.

    Attributes:
        tokens: At least two.
        positions: Ascending; the logits at each predict the token after it, so that none is the last.
    """

    tokens: tuple[int, ...]
    positions: tuple[int, ...]

    @property
    def targets(self) -> tuple[int, ...]:
        """The token that follows each position."""
        return tuple(self.tokens[at + 1] for at in self.positions)


class Probe(Record):
    """What models are asked.

    Attributes:
        rows: To read.
        prompts: To answer greedily, as tokens.
        greedy_tokens: Of each answer, at most.
        end_tokens: Each ends an answer; it is no part of it.
        source: The split that the rows are from; "prompts" where they are of our own.
    """

    rows: tuple[ProbeRow, ...]
    prompts: tuple[tuple[int, ...], ...] = ()
    greedy_tokens: int = 64
    end_tokens: tuple[int, ...] = ()
    source: ProbeSource = "prompts"

    @property
    def positions(self) -> int:
        """Of all rows."""
        return sum(len(row.positions) for row in self.rows)


@dataclass(frozen=True)
class Observation:
    """What a model said to a probe.

    Attributes:
        logits: (positions, vocabulary) float32; positions in the order of the rows.
        greedy: Its answers, as tokens without the end.
    """

    logits: NDArray[np.float32]
    greedy: tuple[tuple[int, ...], ...]

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `ObservationWriter` wrote; the logits stay on disk."""
        answers = json.loads((folder / "greedy.json").read_text(encoding="utf-8"))
        return cls(np.load(folder / "logits.npy", mmap_mode="r"), tuple(tuple(answer) for answer in answers))


class ObservationWriter:
    """Writes an observation row by row, so that the logits of one row at a time are in memory.

    Nothing is mapped: a disk that is full is then an OSError, not the end of the process.

    Args:
        folder: Made where it is not there.
    """

    def __init__(self, folder: Path, probe: Probe) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._probe = probe
        self._width = 0
        self._filled = 0

    def add_row(self, logits: NDArray[np.float32]) -> None:
        """Write the logits of the next row of the probe; or, in their order, of some of its positions.

        Args:
            logits: (its positions, vocabulary).

        Raises:
            OSError: They cannot be written, as on a full disk.
            ValueError: They are more than the probe asks for, or of another width than those before.
        """
        self._width = self._width or logits.shape[1]
        if self._filled + len(logits) > self._probe.positions or logits.shape[1] != self._width:
            raise ValueError("an observation has one row of logits for each position of the probe")
        with (self._folder / "logits.npy").open("ab" if self._filled else "wb") as file:
            if not self._filled:
                shape = (self._probe.positions, self._width)
                head = {"descr": np.lib.format.dtype_to_descr(_LOGITS), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, head)
            file.write(np.ascontiguousarray(logits, dtype=_LOGITS).data)
        self._filled += len(logits)

    def finish(self, greedy: Sequence[Sequence[int]]) -> None:
        """Write the greedy answers, in the order of the prompts.

        Raises:
            OSError: They cannot be written, as on a full disk.
            ValueError: Something of the probe is not answered.
        """
        if self._filled != self._probe.positions or len(greedy) != len(self._probe.prompts):
            raise ValueError("an observation must answer the whole probe")
        (self._folder / "greedy.json").write_text(json.dumps([list(answer) for answer in greedy]), encoding="utf-8")


def agreement(probe: Probe, reference: Observation, found: Observation) -> Agreement:
    """Hold one model's observation against another's.

    Vocabularies that are padded to different sizes are compared up to the smaller: beyond it there are no tokens.
    Differences and divergence are of float64. A logit that is no finite number makes them none either (see
    `Agreement.finite`).
    """
    with np.errstate(invalid="ignore"):
        return _agreement(probe, reference, found)


def _agreement(probe: Probe, reference: Observation, found: Observation) -> Agreement:
    width = min(reference.logits.shape[1], found.logits.shape[1])
    targets = np.array([token for row in probe.rows for token in row.targets])
    total = len(targets)
    largest = difference = divergence = loss_reference = loss = 0.0
    same = 0
    for start in range(0, total, _CHUNK):
        chunk = slice(start, min(start + _CHUNK, total))
        first = reference.logits[chunk, :width].astype(np.float64)
        second = found.logits[chunk, :width].astype(np.float64)
        apart = np.abs(first - second)
        # A maximum of Python's would pass over what is no number.
        largest = float(np.maximum(largest, apart.max()))
        difference += float(apart.mean(axis=1).sum())
        same += int((first.argmax(axis=1) == second.argmax(axis=1)).sum())
        first, second = _log_softmax(first), _log_softmax(second)
        divergence += float((np.exp(first) * (first - second)).sum())
        rows = np.arange(len(first))
        loss_reference -= float(first[rows, targets[chunk]].sum())
        loss -= float(second[rows, targets[chunk]].sum())
    return Agreement(
        positions=total,
        largest_difference=largest,
        mean_difference=difference / total,
        kl=divergence / total,
        same_choice=same / total,
        loss_reference=loss_reference / total,
        loss=loss / total,
        answers=len(probe.prompts),
        greedy_agreement=_greedy_agreement(reference.greedy, found.greedy),
    )


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    total: NDArray[np.float64] = np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    logarithms: NDArray[np.float64] = shifted - total
    return logarithms


def _greedy_agreement(reference: tuple[tuple[int, ...], ...], found: tuple[tuple[int, ...], ...]) -> float | None:
    if not reference:
        return None
    alike = whole = 0
    for first, second in zip(reference, found, strict=True):
        # The end mark counts as a token: an answer that stops where the other goes on differs there.
        longest = max(len(first), len(second)) + 1
        whole += longest
        if first == second:
            alike += longest
        else:
            alike += next(
                (at for at, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]),
                min(len(first), len(second)),
            )
    return alike / whole
