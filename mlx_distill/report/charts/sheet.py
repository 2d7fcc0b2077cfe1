"""The sheet that every chart is drawn on, and the style they share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.lines import Line2D

from mlx_distill.layout import atomic_file
from mlx_distill.report.palette import LIGHT, Theme
from mlx_distill.report.wording import plain

WIDTH_INCHES = 12.0
DPI = 150
_KEY_COLUMNS = 3

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 13,
    "text.parse_math": False,  # "$1.61 … $155" is money, not a formula
    "axes.labelsize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.8,
    "xtick.labelsize": 13,
    "ytick.labelsize": 13,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 13,
}


def _colours(theme: Theme) -> dict[str, str]:
    return {
        "text.color": theme.text,
        "axes.edgecolor": theme.line,
        "axes.labelcolor": theme.muted,
        "grid.color": theme.line,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "figure.facecolor": theme.ground,
        "axes.facecolor": theme.ground,
    }


class Sheet:
    """A figure with a title that states the finding, a line beneath it, a key to the colours and a foot.

    Args:
        height: Of the drawing between head and foot, in inches.
        key: Handles of a legend that stands in the head, three a line.
    """

    def __init__(
        self,
        title: str,
        subtitle: str,
        height: float,
        *,
        foot: str = "",
        key: Sequence[Line2D] = (),
        theme: Theme = LIGHT,
    ) -> None:
        heading = _wrap(title.rstrip("."), fontsize=18, weight="bold")
        lines = _wrap(subtitle, fontsize=13)
        notes = _wrap(foot, fontsize=12)
        columns = min(len(key), _KEY_COLUMNS)
        head = (
            0.42 + 0.35 * len(heading) + 0.27 * len(lines) + (0.38 + 0.28 * ((len(key) - 1) // columns) if key else 0)
        )
        tail = 0.14 + 0.25 * len(notes)
        total = head + height + tail
        self.figure = Figure(figsize=(WIDTH_INCHES, total), dpi=DPI, layout="constrained")
        FigureCanvasAgg(self.figure)
        engine: Any = self.figure.get_layout_engine()
        engine.set(rect=(0.012, tail / total, 0.976, height / total), w_pad=0.08, h_pad=0.06)
        y = total - 0.28
        for line in heading:
            y = self._write(y, 0.35, line, fontsize=18, fontweight="bold")
        for line in lines:
            y = self._write(y, 0.27, line, fontsize=13, color=theme.muted)
        if key:
            at = {"loc": "upper left", "bbox_to_anchor": (0.013, (y - 0.06) / total), "borderaxespad": 0.0}
            self.figure.legend(handles=list(key), ncols=columns, handletextpad=0.2, columnspacing=1.8, **at)
        y = tail - 0.02
        for line in notes:
            y = self._write(y, 0.25, line, fontsize=12, color=theme.muted)

    def _write(self, y: float, step: float, text: str, **style: Any) -> float:
        self.figure.text(0.02, y / self.figure.get_figheight(), text, va="top", ha="left", **style)
        return y - step

    def save(self, path: Path) -> None:
        """Write the PNG, atomically."""
        with atomic_file(path) as temporary:
            self.figure.savefig(temporary, format="png", metadata={"Software": None})


def _wrap(text: str, *, fontsize: float, weight: str = "normal") -> list[str]:
    """Break text into lines that fit the sheet, by the true widths of its letters."""
    font = get_font(findfont(FontProperties(family="DejaVu Sans", weight=weight)))
    font.set_size(fontsize, 72)
    room = WIDTH_INCHES * 72 * 0.96

    def width(line: str) -> float:
        font.set_text(line)
        return float(font.get_width_height()[0]) / 64

    lines: list[str] = []
    for word in plain(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and width(longer) <= room:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


@contextlib.contextmanager
def style(theme: Theme = LIGHT) -> Iterator[None]:
    """The settings under which a chart is drawn and saved."""
    with mpl.rc_context({**_STYLE, **_colours(theme)}):
        yield
