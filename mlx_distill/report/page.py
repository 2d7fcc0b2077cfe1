"""`report.html`: one file that shows a comparison and needs nothing else.

The page carries a policy (Content-Security-Policy) under which only its own style sheet and script, named by their
hashes, may work: were anything of an answer ever to reach the page as markup, it could neither run nor fetch.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mlx_distill.report import findings, wording
from mlx_distill.report.commands import commands_to_repeat
from mlx_distill.report.cost import SCALES, CostScaling
from mlx_distill.report.evidence import Evidence
from mlx_distill.report.prose import render_answer
from mlx_distill.report.scores import JudgeLabel, Scorecard, dimension_title
from mlx_distill.report.settings import settings_of
from mlx_distill.report.svg import Series, line_chart
from mlx_distill.report.training import Course, smooth

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Fact:
    """A figure at the head of the page: what it was, what it is."""

    title: str
    value: str
    before: str | None = None
    detail: str | None = None


@dataclass(frozen=True)
class JudgedAnswer:
    """A judge's scores for one answer, ready to be read."""

    judge: JudgeLabel
    overall: float | None
    scores: Sequence[tuple[str, float, str]]
    problem: str | None


@dataclass(frozen=True)
class AnswerCard:
    """One contender's answer to one prompt, ready to be read."""

    contender: str
    model: str
    html: Markup | None
    empty: bool
    flag: str | None
    figures: str
    verdicts: Sequence[JudgedAnswer]


def page(evidence: Evidence, cards: tuple[Scorecard, ...], course: Course | None, scaling: CostScaling | None) -> str:
    """The whole page, as HTML."""
    style, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("report.css", "report.js"))
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "score": wording.score,
        "change": wording.change,
        "percent": wording.percent,
        "loss": wording.loss,
        "count": wording.count,
        "money": wording.money,
        "visible": wording.visible,
        "prose": render_answer,
        "title_of": wording.title_of,
        "dimension": dimension_title,
        "at_scale": wording.prompts_at_scale,
    }
    scored = [card for card in cards if card.overall]
    return environment.get_template("report.html").render(
        e=evidence,
        cards=cards,
        course=course,
        scaling=scaling,
        scales=SCALES,
        # The line beneath the heading names the judge.
        headline=(findings.score_finding(scored[0]) if scored else None) or findings.headline(evidence, cards, course),
        first=scored[0] if scored else None,
        gap=findings.gap_closed(scored[0]) if scored else None,
        facts=facts(evidence, course),
        missing=findings.missing(evidence, cards, course),
        cautions=findings.cautions(evidence, cards),
        answers=[(prompt, answer_cards(evidence, cards, prompt.id)) for prompt in evidence.prompts],
        curves=curves(course) if course else [],
        settings=settings_of(evidence),
        commands=commands_to_repeat(evidence),
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; "
        "img-src data:; base-uri 'none'; form-action 'none'",
    )


def _source(text: str) -> str:
    """A Content-Security-Policy source that allows exactly this text inline."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def facts(evidence: Evidence, course: Course | None) -> list[Fact]:
    """The figures beneath the headline."""
    found: list[Fact] = []
    run = evidence.run
    if course and course.first and course.best:
        a, b = course.first, course.best
        moved = b.step > a.step
        found.append(Fact("Validation loss", wording.loss(b.loss), wording.loss(a.loss) if moved else None))
        accuracy = wording.percent(a.token_accuracy) if moved else None
        found.append(Fact("Token accuracy", wording.percent(b.token_accuracy), accuracy))
    counts = findings.cut_counts(evidence)
    if "distilled" in counts:
        before = f"{counts['base'][1] - counts['base'][0]}" if "base" in counts else None
        cut, total = counts["distilled"]
        found.append(Fact("Finished answers", f"{total - cut} of {total}", before))
    if run and run.seconds is not None:
        speed = f"{run.tokens_per_second:,.0f} tokens/s" if run.tokens_per_second else None
        found.append(Fact("Training", wording.duration(run.seconds), detail=speed))
    if run and "train" in run.splits:
        teacher = f"from {evidence.manifest.teacher}" if evidence.manifest else None
        found.append(Fact("Training rows", wording.count(run.splits["train"].rows), detail=teacher))
    return found


def answer_cards(evidence: Evidence, cards: Sequence[Scorecard], prompt_id: str) -> list[AnswerCard]:
    """What each contender said to a prompt, in the order of display."""
    return [_answer_card(evidence, cards, prompt_id, contender) for contender in evidence.contenders]


def _answer_card(evidence: Evidence, cards: Sequence[Scorecard], prompt_id: str, contender: str) -> AnswerCard:
    answer = evidence.answer(prompt_id, contender)
    model = evidence.models[contender]
    if answer is None:
        return AnswerCard(contender, model, None, False, None, "", ())
    figures = wording.plural(answer.output_tokens, "token")
    if answer.seconds > 0:
        figures += f" · {wording.duration(answer.seconds)}"
    verdicts = []
    for card in cards:
        verdict = evidence.verdict(card.judge.spec, prompt_id, contender)
        if verdict is not None:
            scores = [(dimension_title(d), s.score, s.rationale) for d, s in verdict.scores.items()]
            verdicts.append(JudgedAnswer(card.judge, verdict.overall, scores, verdict.problem))
    empty = not answer.text.strip()
    return AnswerCard(
        contender, model, render_answer(answer.text), empty, findings.stop_flag(answer), figures, verdicts
    )


def curves(course: Course) -> list[tuple[str, Markup]]:
    """Loss and token accuracy over the steps."""
    drawn = []
    for title, field, show, tick in (
        ("Loss, nats a token", "loss", wording.loss, lambda v: f"{v:.2f}"),
        ("Token accuracy", "token_accuracy", wording.percent, lambda v: f"{v * 100:g} %"),
    ):
        steps = [(float(row.step), float(getattr(row, field))) for row in course.steps]
        means = smooth([y for _, y in steps], max(1, len(steps) // 12))
        series = [
            Series("Training rows", "raw", steps),
            Series("Training rows, smoothed", "mean", [(x, y) for (x, _), y in zip(steps, means, strict=True)]),
            Series("Validation rows", "valid", [(float(r.step), float(getattr(r, field))) for r in course.valid], True),
        ]
        drawn.append((title, line_chart(title, series, show=show, tick=tick, x_name="optimizer steps")))
    return drawn
