"""`report.html`: one file that shows a comparison and needs nothing else.

The page carries a policy (Content-Security-Policy) under which only its own style sheet and script, named by their
hashes, may work: were anything of an answer ever to reach the page as markup, it could neither run nor fetch.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from mlx_distill.report import figures, findings, wording
from mlx_distill.report.analysis import Analysis, headline
from mlx_distill.report.answers import MANY_PROMPTS, cases_of
from mlx_distill.report.commands import commands_to_repeat
from mlx_distill.report.cost import SCALES
from mlx_distill.report.curves import curves, points_table
from mlx_distill.report.evidence import Evidence
from mlx_distill.report.intervals import Estimate
from mlx_distill.report.losses import Losses
from mlx_distill.report.palette import slot
from mlx_distill.report.prose import render_answer
from mlx_distill.report.radar import radar
from mlx_distill.report.scores import dimension_title
from mlx_distill.report.settings import settings_of
from mlx_distill.report.training import Course

_TEMPLATES = Path(__file__).parent / "templates"
_STYLES = ("base.css", "figures.css", "answers.css", "narrow.css", "print.css")
_SCRIPTS = ("theme.js", "folding.js", "finding.js", "curves.js")


@dataclass(frozen=True)
class Fact:
    """A figure at the head of the page: what it was, what it is."""

    title: str
    value: str
    before: str | None = None
    detail: str | None = None


@dataclass(frozen=True)
class Standing:
    """A contender beneath the headline.

    Attributes:
        value: In words; None where nothing is known.
        share: The same from 0 to 1, for its bar.
        low: Of its interval, likewise.
        high: Of its interval.
    """

    contender: str
    value: str | None
    share: float | None = None
    low: float | None = None
    high: float | None = None


def page(analysis: Analysis) -> str:
    """The whole page, as HTML."""
    evidence, course = analysis.evidence, analysis.course
    style, script = (
        "\n".join((_TEMPLATES / name).read_text(encoding="utf-8") for name in names) for names in (_STYLES, _SCRIPTS)
    )
    scored = analysis.scored
    cases = cases_of(analysis)
    return (
        _environment(evidence)
        .get_template("report.html")
        .render(
            e=evidence,
            a=analysis,
            cards=analysis.cards,
            course=course,
            scaling=analysis.scaling,
            scales=SCALES,
            # The line beneath the heading names the judge.
            headline=headline(analysis, judged=False),
            first=scored[0] if scored else None,
            gap=findings.gap_closed(scored[0]) if scored else None,
            standings=standings(analysis),
            facts=facts(evidence, course, analysis.losses),
            missing=analysis.missing,
            cautions=analysis.cautions,
            tests=figures.tables_of_tests(analysis),
            losses=figures.tables_of_losses(analysis),
            judges=[*figures.tables_of_judges(analysis), *figures.tables_of_people(analysis)],
            lengths=figures.tables_of_answers(analysis),
            pairs=figures.tables_of_pairs(analysis),
            rivals=figures.tables_of_rivals(analysis),
            radars={card.judge.spec: radar(card, evidence) for card in analysis.cards},
            cases=cases,
            fields=sorted({prompt.field for prompt in evidence.prompts}),
            many=len(cases) >= MANY_PROMPTS,
            curves=curves(course) if course else [],
            points=points_table(course) if course else None,
            minimised=findings.minimised_finding(course) if course else None,
            settings=settings_of(evidence),
            commands=commands_to_repeat(evidence),
            style=Markup(style),
            script=Markup(script),
            policy=f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; "
            "img-src data:; base-uri 'none'; form-action 'none'",
        )
    )


def _environment(evidence: Evidence) -> Environment:
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
        "distance": wording.distance,
        "count": wording.count,
        "money": wording.money,
        "visible": wording.visible,
        "prose": render_answer,
        "title_of": wording.title_of,
        "dimension": dimension_title,
        "at_scale": wording.prompts_at_scale,
        "span": lambda found: wording.span(found.interval if found else None, wording.signed),
        "slot": lambda contender: slot(contender, evidence.contenders) if contender else "",
    }
    return environment


def _source(text: str) -> str:
    """A Content-Security-Policy source that allows exactly this text inline."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def standings(analysis: Analysis) -> list[Standing]:
    """The contenders, by what the headline rests on."""
    found = []
    for contender in analysis.evidence.contenders:
        mean: Estimate | None = None
        top = 1.0
        if analysis.tests_lead and analysis.objective:
            tested = analysis.objective.contenders.get(contender)
            mean = tested.pass_1 if tested else None
        elif analysis.scored:
            mean, top = analysis.scored[0].overall.get(contender), 10.0
        if mean is None:
            found.append(Standing(contender, None))
            continue
        value = wording.percent(mean.value) if top == 1 else wording.score(mean.value)
        ends = (mean.interval.low / top, mean.interval.high / top) if mean.interval else (None, None)
        found.append(Standing(contender, value, mean.value / top, *ends))
    return found


def facts(evidence: Evidence, course: Course | None, losses: Losses | None = None) -> list[Fact]:
    """The figures beneath the headline."""
    found: list[Fact] = []
    run = evidence.run
    if course and course.first and course.best:
        a, b = course.first, course.best
        moved = b.step > a.step
        found.append(Fact("Validation loss", wording.loss(b.loss), wording.loss(a.loss) if moved else None))
        accuracy = wording.percent(a.token_accuracy) if moved else None
        found.append(Fact("Token accuracy", wording.percent(b.token_accuracy), accuracy))
    apart = losses.distances.contenders if losses and losses.distances else {}
    if "distilled" in apart:
        before = wording.distance(apart["base"]) if "base" in apart else None
        detail = "forward KL, nats a token, held-out answers"
        found.append(Fact("Divergence from the teacher", wording.distance(apart["distilled"]), before, detail))
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
