"""The verdicts and duels of a comparison: which of them hold, and the files that new ones are appended to."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_distill.judges.base import Pair
from mlx_distill.layout import ComparisonFolder, append_row, drop_torn_line, read_rows
from mlx_distill.records import Generation, Verdict
from mlx_distill.scores import Duel

_Key = tuple[str, ...]


class Book:
    """Opened under the folder's lock. Of two rows on the same answers by the same judge the later counts.

    Raises:
        InputError: A row cannot be read.
        ResourceError: A row cannot be written (from any method that keeps one).
    """

    def __init__(self, folder: ComparisonFolder) -> None:
        self._folder = folder
        for path in (folder.verdicts, folder.duels):
            drop_torn_line(path)
        self._verdicts = {_of_verdict(row): row for row in read_rows(folder.verdicts, Verdict)}
        self._duels = {_of_duel(row): row for row in read_rows(folder.duels, Duel)}

    def verdict(self, judge: str, answer: Generation) -> Verdict | None:
        """A judge's verdict on this very answer."""
        return self._verdicts.get((judge, answer.prompt.id, answer.contender, answer.answer_sha256))

    def verdicts(self, judge: str, answers: Sequence[Generation]) -> list[Verdict]:
        """A judge's verdicts on these answers, in their order; those that there are."""
        return [found for answer in answers if (found := self.verdict(judge, answer))]

    def duel(self, judge: str, pair: Pair) -> Duel | None:
        """What a judge said of this very pair in this order."""
        first, second = pair.first, pair.second
        return self._duels.get(
            (judge, first.prompt.id, first.contender, second.contender, first.answer_sha256, second.answer_sha256)
        )

    def duels(self, judge: str, pairs: Sequence[Pair]) -> list[Duel]:
        """What a judge said of these pairs, in their order; what there is."""
        return [found for pair in pairs if (found := self.duel(judge, pair))]

    def keep(self, row: Verdict | Duel) -> None:
        """Append a row; one that says what is known already is left out."""
        if isinstance(row, Verdict):
            if self._verdicts.get(_of_verdict(row)) != row:
                append_row(self._folder.verdicts, row)
                self._verdicts[_of_verdict(row)] = row
        elif self._duels.get(_of_duel(row)) != row:
            append_row(self._folder.duels, row)
            self._duels[_of_duel(row)] = row


def _of_verdict(row: Verdict) -> _Key:
    return row.judge, row.prompt_id, row.contender, row.answer_sha256


def _of_duel(row: Duel) -> _Key:
    return row.judge, row.prompt_id, row.first, row.second, row.first_sha256, row.second_sha256
