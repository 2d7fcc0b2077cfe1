"""What students learned, by what they learned from: kept as JSON, told as a table and as a chart."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from mlx_distill.errors import InputError
from mlx_distill.records import Record

#: The pruned model before any training, and a student of text alone; the other names are their own titles.
UNTRAINED, TEXT = "untrained", "text"
_TITLES = {UNTRAINED: "the pruned model, untrained", TEXT: "the text"}

Measure = Literal["loss", "apart"]
MEASURES: tuple[Measure, Measure] = ("loss", "apart")


class Figures(Record):
    """A student on the held-out rows, in nats a token.

    Attributes:
        loss: Cross-entropy of their answers.
        apart: Forward KL from the teacher.
        seconds: Of a step, median; None where there was none.
    """

    loss: float
    apart: float
    seconds: float | None = None


class Learned(Record):
    """All that a call of `distill_table` found, or had found when it was interrupted.

    Attributes:
        model: The teacher, of which the student has `keep_layers` layers.
        seeds: Asked for.
        found: Of each way, the figures of its seeds.
    """

    format: Literal[1] = 1
    machine: str
    date: str
    model: str
    keep_layers: int
    rows: int
    epochs: int
    seeds: int
    learning_rate: float
    found: dict[str, list[Figures]]

    def ways(self) -> dict[str, list[Figures]]:
        """Those with figures, as they are titled."""
        return {_TITLES.get(name, name): own for name, own in self.found.items() if own}

    def table(self) -> Iterator[str]:
        """Lines of Markdown: means over the seeds, and the least and most of them."""
        yield f"{self.machine}, {self.date}; {self.about()}."
        yield from (
            "",
            "| learned from | held-out loss | divergence from the teacher | a step |",
            "|---|---:|---:|---:|",
        )
        for title, own in self.ways().items():
            times = [figures.seconds for figures in own if figures.seconds is not None]
            step = f"{statistics.median(times):.2f} s" if times else ""
            yield f"| {title} | {_cell(own, 'loss')} | {_cell(own, 'apart')} | {step} |"

    def about(self) -> str:
        """What was trained, and how much."""
        seeds = max((len(own) for own in self.found.values()), default=0)
        return (
            f"{Path(self.model).name} teaches itself with {self.keep_layers} of its layers; {self.rows} rows, "
            f"{self.epochs} epoch{'s' * (self.epochs > 1)}, {seeds} seed{'s' * (seeds > 1)}"
        )

    def finding(self, path: Path | None = None) -> str:
        """Whether each came nearer to what it learned from, and if not, who came nearest to what.

        Raises:
            InputError: Nothing was trained.
        """
        trained = {name: own for name, own in self.found.items() if own and name != UNTRAINED}
        if not trained:
            raise InputError("holds no figures of a training.", path=path)
        loss, apart = ({name: mean(own, of) for name, own in self.found.items() if own} for of in MEASURES)
        others = [name for name in trained if name != TEXT]
        if (
            {UNTRAINED, TEXT} <= loss.keys()
            and others
            and loss[TEXT] < min(loss[name] for name in (UNTRAINED, *others))
            and max(apart[name] for name in others) < min(apart[UNTRAINED], apart[TEXT])
        ):
            return "Each comes nearer to what it learned from: to the text, or to the teacher"
        nearest = [min(trained, key=of.__getitem__) for of in (loss, apart)]
        text, teacher = (_TITLES.get(name, name) for name in nearest)
        return f"Nearest to the text: {text}; nearest to the teacher: {teacher}"


def mean(own: list[Figures], of: Measure) -> float:
    """Over seeds."""
    return statistics.mean(getattr(figures, of) for figures in own)


def _cell(own: list[Figures], of: Measure) -> str:
    values: list[Any] = [getattr(figures, of) for figures in own]
    spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
    return f"{mean(own, of):.3f}{spread}"
