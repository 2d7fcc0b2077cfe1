"""What a judge is, and what it judges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mlx_distill.records import Generation, Verdict

#: The five dimensions, id → title, each scored from 0 to 10.
DIMENSIONS: dict[str, str] = {
    "correctness": "Code Correctness",
    "structure": "Structure & Design",
    "documentation": "Documentation",
    "error_handling": "Error Handling",
    "completeness": "Completeness",
}


@dataclass(frozen=True)
class Case:
    """One answer to judge. The judge is not told who wrote it: `generation.contender` and `.model` are
    there to label the verdict, never to be shown.

    Attributes:
        names: Of all contenders of the comparison and their models, which an answer may mention.
    """

    generation: Generation
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, in the order in which they are shown; as blind as a `Case`."""

    first: Generation
    second: Generation
    names: tuple[str, ...] = ()


class Judge(Protocol):
    """Scores answers. Implementations live one a file in this package."""

    #: "rubric", or the spec of the model that judges.
    name: str

    async def score(self, case: Case) -> Verdict:
        """Score one answer on every dimension.

        Returns:
            A verdict; one without scores, saying the problem, where the judge's answer could not be read.
        """
        ...

    async def close(self) -> None:
        """Let go of connections and files."""
        ...
