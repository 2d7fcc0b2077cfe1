"""The scorecard, and the scores prompt by prompt."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator

from mlx_distill.report import findings
from mlx_distill.report.charts.sheet import Sheet, style
from mlx_distill.report.evidence import Evidence
from mlx_distill.report.intervals import Estimate
from mlx_distill.report.palette import LIGHT, Theme, ink
from mlx_distill.report.scores import Scorecard, dimension_title
from mlx_distill.report.wording import plain, score, shorten, title_of

#: A comparison of more prompts shows those that changed most.
MOST_PROMPTS = 40


def model_scorecard(path: Path, cards: Sequence[Scorecard], evidence: Evidence, theme: Theme = LIGHT) -> None:
    """Five dimensions and the overall mean, a panel a judge; lines show the overall means' intervals."""
    title = findings.attributed(findings.score_finding(cards[0]) or "No verdict could be read.", cards)
    known = any(mean.interval for card in cards for mean in card.overall.values())
    with style(theme):
        subtitle = f"Mean score, 0 to 10, over {len(evidence.prompts)} held-out prompts."
        sheet = Sheet(
            title,
            f"{subtitle} {_judged_by(cards)}{' Lines: 95 % intervals.' if known else ''}",
            4.4 * len(cards),
            foot=findings.few_prompts(cards[0]) or "",
            key=key_of(evidence, theme, square=True),
            theme=theme,
        )
        panels = sheet.figure.subplots(len(cards), 1, squeeze=False)[:, 0]
        for axes, card in zip(panels, cards, strict=True):
            _scorecard_panel(axes, card, evidence, theme, named=len(cards) > 1)
        sheet.save(path)


def _scorecard_panel(axes: Any, card: Scorecard, evidence: Evidence, theme: Theme, *, named: bool) -> None:
    groups = [("Overall", card.overall), *((dimension_title(d), means) for d, means in card.dimensions.items())]
    width = 0.8 / max(1, len(evidence.contenders))
    centres = [0.0, *(1.25 + i for i in range(len(groups) - 1))]
    size = 13 if len(evidence.contenders) <= 4 else 10
    for centre, (_, means) in zip(centres, groups, strict=True):
        for i, contender in enumerate(evidence.contenders):
            if contender not in means:
                continue
            x = centre + (i - (len(evidence.contenders) - 1) / 2) * width
            mean, colour = means[contender], theme.colour(ink(contender, evidence.contenders))
            axes.bar(x, mean.value, width * 0.92, color=colour)
            top = mean.interval.high if mean.interval else mean.value
            whisker(axes, x, mean, theme)
            axes.annotate(
                score(mean.value),
                (x, min(top, 10.0)),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=size,
                fontweight="bold",
                color=colour,
            )
    axes.axvspan(-0.55, 0.55, color=theme.faint, zorder=0)
    axes.set_xticks(centres, [title.replace(" & ", " &\n") if len(title) > 16 else title for title, _ in groups])
    axes.get_xticklabels()[0].set_fontweight("bold")
    for tick in axes.get_xticklabels():
        tick.set_color(theme.text)
    axes.set_xlim(-0.62, centres[-1] + 0.55)
    axes.set_ylim(0, 11)
    axes.yaxis.set_major_locator(FixedLocator([0, 2, 4, 6, 8, 10]))
    axes.grid(axis="x", visible=False)
    axes.spines["left"].set_visible(False)
    if named:
        axes.set_title(plain(card.judge.full), loc="left", fontsize=13, fontweight="bold", pad=8)


def whisker(axes: Any, x: float, mean: Estimate, theme: Theme, *, times: float = 1.0) -> None:
    """A line over a mean's interval, where it has one."""
    if mean.interval is None:
        return
    reach = [[(mean.value - mean.interval.low) * times], [(mean.interval.high - mean.value) * times]]
    reach = [[max(0.0, side[0])] for side in reach]
    axes.errorbar([x], [mean.value * times], yerr=reach, fmt="none", ecolor=theme.text, elinewidth=1.6, capsize=4)


def prompt_comparison(path: Path, cards: Sequence[Scorecard], evidence: Evidence, theme: Theme = LIGHT) -> None:
    """The overall score of each answer, a row a prompt, a panel a judge."""
    title = findings.attributed(findings.prompt_finding(cards[0]) or "Overall score of each answer.", cards)
    rows = [_chosen(card) for card in cards]
    hollow = any(not g.finished for g in evidence.generations)
    subtitle = "Overall score of each answer, 0 to 10." + (
        " Hollow: the answer did not end by itself." if hollow else ""
    )
    shown = len(rows[0])
    more = f" Shown are the {shown} prompts that changed most." if shown < len(cards[0].prompts) else ""
    with style(theme):
        height = sum(1.1 + 0.55 * len(r) for r in rows)
        sheet = Sheet(
            title,
            f"{subtitle}{more} {_judged_by(cards)}",
            height,
            foot=findings.few_prompts(cards[0]) or "",
            key=key_of(evidence, theme),
            theme=theme,
        )
        panels = sheet.figure.subplots(len(cards), 1, squeeze=False, height_ratios=[1.1 + 0.55 * len(r) for r in rows])[
            :, 0
        ]
        for axes, card, chosen in zip(panels, cards, rows, strict=True):
            _prompt_panel(axes, card, chosen, evidence, theme, named=len(cards) > 1)
        sheet.save(path)


def _chosen(card: Scorecard) -> list[str]:
    """All prompts in their order; if they are too many, those with the largest change."""
    ids = list(card.prompts)
    if len(ids) <= MOST_PROMPTS:
        return ids

    def moved(prompt: str) -> float:
        row = card.prompts[prompt]
        return abs(row["distilled"] - row["base"]) if {"base", "distilled"} <= row.keys() else 0.0

    most = set(sorted(ids, key=moved, reverse=True)[:MOST_PROMPTS])
    return [prompt for prompt in ids if prompt in most]


def _prompt_panel(
    axes: Any, card: Scorecard, chosen: list[str], evidence: Evidence, theme: Theme, *, named: bool
) -> None:
    for y, prompt in enumerate(chosen):
        row = card.prompts[prompt]
        axes.plot([0, 10], [y, y], color=theme.line, linewidth=1, zorder=1)
        if {"base", "distilled"} <= row.keys() and abs(row["distilled"] - row["base"]) > 0.3:
            axes.annotate(
                "",
                (row["distilled"], y),
                (row["base"], y),
                zorder=2,
                arrowprops={
                    "arrowstyle": "-|>",
                    "color": theme.colour(ink("distilled")),
                    "linewidth": 2.2,
                    "shrinkA": 7,
                    "shrinkB": 7,
                },
            )
        for column, contender in enumerate(evidence.contenders):
            if contender not in row:
                continue
            answer = evidence.answer(prompt, contender)
            whole = answer is None or answer.finished
            drawn = ink(contender, evidence.contenders)
            colour = theme.colour(drawn)
            axes.plot(
                [row[contender]],
                [y],
                drawn.marker,
                color=colour,
                markersize=13 if drawn.marker == "o" else 11,
                markerfacecolor=colour if whole else theme.ground,
                markeredgewidth=2.4,
                zorder=3,
                clip_on=False,
            )
            axes.text(
                10.85 + 0.98 * column,
                y,
                score(row[contender]),
                ha="center",
                va="center",
                fontsize=13,
                fontweight="bold",
                color=colour,
            )
    for column, contender in enumerate(evidence.contenders):
        axes.text(
            10.85 + 0.98 * column,
            -0.62,
            shorten(title_of(contender), 10),
            ha="center",
            va="bottom",
            fontsize=11,
            color=theme.colour(ink(contender, evidence.contenders)),
        )
    axes.set_yticks(range(len(chosen)), ["\n".join(textwrap.wrap(plain(p), 26, break_long_words=True)) for p in chosen])
    for tick in axes.get_yticklabels():
        tick.set_color(theme.text)
    axes.set_ylim(len(chosen) - 0.4, -0.75)
    axes.set_xlim(-0.2, 10.45 + 0.98 * len(evidence.contenders))
    axes.xaxis.set_major_locator(FixedLocator([0, 2, 4, 6, 8, 10]))
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    if named:
        axes.set_title(plain(card.judge.full), loc="left", fontsize=13, fontweight="bold", pad=10)


def key_of(evidence: Evidence, theme: Theme, *, square: bool = False) -> list[Line2D]:
    """A legend of the contenders, each with its model."""
    order = evidence.contenders
    return [
        Line2D([], [], color=theme.colour(ink(c, order)), marker="s" if square else ink(c, order).marker,
               linestyle="none", markersize=11, label=f"{title_of(c)}: {shorten(evidence.models[c], 28)}")
        for c in order
    ]  # fmt: skip


def _judged_by(cards: Sequence[Scorecard]) -> str:
    return f"Judge: {cards[0].judge.full}." if len(cards) == 1 else f"{len(cards)} judges, each by itself."
