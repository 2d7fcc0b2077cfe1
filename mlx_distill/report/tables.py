"""`results.md`: the comparison as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mlx_distill.report import figures, findings
from mlx_distill.report.analysis import Analysis, headline
from mlx_distill.report.commands import commands_to_repeat
from mlx_distill.report.cost import SCALES, CostScaling
from mlx_distill.report.evidence import Evidence
from mlx_distill.report.figures import Table
from mlx_distill.report.findings import Note
from mlx_distill.report.intervals import Estimate
from mlx_distill.report.scores import Scorecard, dimension_title
from mlx_distill.report.settings import settings_of
from mlx_distill.report.training import Course
from mlx_distill.report.wording import (
    change,
    code_cell,
    distance,
    loss,
    money,
    percent,
    plain_cell,
    prompts_at_scale,
    score,
    signed,
    span,
    title_of,
)


def results(analysis: Analysis) -> str:
    """The whole file, as Markdown."""
    evidence, objective = analysis.evidence, analysis.objective
    parts = [
        f"# {plain_cell(evidence.name)}: results",
        plain_cell(headline(analysis)),
        *_notes("What is missing", analysis.missing),
        *_notes("Before you believe it", analysis.cautions),
        *_section("Hidden tests", figures.tables_of_tests(analysis), "objective" if objective else None),
        *_section("Held-out answers of the teacher", figures.tables_of_losses(analysis)),
        *_training(analysis.course),
        *(part for card in analysis.cards for part in _scores(card, evidence)),
        *_section("Judges", [*figures.tables_of_judges(analysis), *figures.tables_of_people(analysis)]),
        *_section("Pairwise", figures.tables_of_pairs(analysis)),
        *_section("Other runs", figures.tables_of_rivals(analysis)),
        *_answers(analysis),
        *_cost(analysis.scaling),
        "## Configuration",
        markdown_table(
            ("Setting", "Value"), ((plain_cell(k), code_cell(v)) for k, v in settings_of(evidence)), right=False
        ),
        "## To repeat it",
        "```sh\n" + "\n".join(line.replace("`", "'") for line in commands_to_repeat(evidence)) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _section(title: str, tables: Sequence[Table], chart: str | None = None) -> list[str]:
    if not tables:
        return []
    parts = [f"## {title}"]
    for table in tables:
        rows = [tuple(plain_cell(cell) for cell in row) for row in table.rows]
        parts += [f"### {table.title}", markdown_table(table.head, rows), plain_cell(table.note)]
    if chart:
        parts.append(f"![{title}]({chart}.png)")
    return [part for part in parts if part]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: bool = True) -> str:
    """A Markdown table; all columns but the first are numbers and stand to the right."""
    rule = ["---", *("---:" if right else "---" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _notes(title: str, notes: Sequence[Note]) -> list[str]:
    if not notes:
        return []
    lines = [f"- {plain_cell(n.text)}" + (f" {code_cell(n.command)}" if n.command else "") for n in notes]
    return [f"## {title}", "\n".join(lines)]


def _training(course: Course | None) -> list[str]:
    if course is None:
        return []
    head = ("Epoch", "Train loss", "Train token accuracy", "Valid loss", "Valid token accuracy")
    rows = [
        (
            "before" if e.number == 0 else str(e.number),
            *(loss(e.train_loss), percent(e.train_accuracy), loss(e.valid_loss), percent(e.valid_accuracy)),
            *((distance(e.train_divergence), distance(e.valid_divergence)) if course.minimised else ()),
            "yes" if e.kept else "",
        )
        for e in course.epochs
    ]
    apart = ("Train divergence", "Valid divergence") if course.minimised else ()
    parts = ["## Training progress", markdown_table((*head, *apart, "Adapter kept"), rows)]
    if found := findings.minimised_finding(course):
        parts.append(plain_cell(found))
    if test := course.test:
        more = "" if test.divergence is None else f", divergence {distance(test.divergence)}"
        parts.append(f"Test: loss {loss(test.loss)}, token accuracy {percent(test.token_accuracy)}{more}.")
    return [*parts, "![Training curves](training_curves.png)"]


def _scores(card: Scorecard, evidence: Evidence) -> list[str]:
    contenders = evidence.contenders
    head = [title_of(c) for c in contenders] + ["Distilled − base"]
    paired = [*head, "95 % interval"]
    if not card.overall:
        return [f"## Scorecard by {plain_cell(card.judge.full)}", "No verdict could be read."]
    dimensions = [
        (plain_cell(dimension_title(d)), *_means(means, card.dimension_changes.get(d), contenders))
        for d, means in card.dimensions.items()
    ]
    total = ("**Overall**", *(f"**{cell}**" for cell in _means(card.overall, card.change, contenders)))
    counted = ", ".join(f"{title_of(c).lower()} {m.n}" for c, m in card.overall.items())
    prompts = [(code_cell(p), *_row(row, contenders)) for p, row in card.prompts.items()]
    parts = [
        f"## Scorecard by {plain_cell(card.judge.full)}",
        f"Means of scores from 0 to 10; answers scored: {counted}.",
        markdown_table(["Dimension", *paired], [*dimensions, total]),
    ]
    spans = [f"{title_of(c)} {span(m.interval, score)}" for c, m in card.overall.items() if m.interval]
    if spans:
        parts.append(f"95 % intervals of the overall means: {plain_cell(', '.join(spans))}.")
    share = findings.gap_closed(card)
    if share is not None:
        parts.append(f"Share of the gap to the teacher that was closed: {share * 100:.0f} %.")
    return [
        *parts,
        f"### Prompt by prompt, by {plain_cell(card.judge.full)}",
        markdown_table(["Prompt", *head], prompts),
    ]


def _means(means: dict[str, Estimate], paired: Estimate | None, contenders: Sequence[str]) -> tuple[str, ...]:
    values = (means[c].value if c in means else None for c in contenders)
    return (
        *(score(value) for value in values),
        change(paired.value if paired else None),
        span(paired.interval if paired else None, signed),
    )


def _row(values: dict[str, float], contenders: Sequence[str]) -> tuple[str, ...]:
    both = "base" in values and "distilled" in values
    difference = values["distilled"] - values["base"] if both else None
    return (*(score(values.get(c)) for c in contenders), change(difference))


def _answers(analysis: Analysis) -> list[str]:
    (found,) = figures.tables_of_answers(analysis)
    rows = [(plain_cell(row[0]), code_cell(row[1]), *row[2:]) for row in found.rows]
    parts = ["## Answers", markdown_table(found.head, rows)]
    flagged = [
        f"- {code_cell(a.prompt.id)}, {title_of(a.contender).lower()}: {findings.stop_flag(a)}"
        for a in analysis.evidence.generations
        if not a.finished
    ]
    return [*parts, "Answers that did not end by themselves:", "\n".join(flagged)] if flagged else parts


def _cost(scaling: CostScaling | None) -> list[str]:
    if scaling is None:
        return ["## Cost scaling", "No token counts are known, so no cost can be projected."]
    rows = []
    for model in scaling.models:
        for batch in (False, True):
            costs = (money(model.cost(scaling.averages, n, batch=batch)) for n in SCALES)
            rows.append((f"{plain_cell(model.name)}{', in batches' if batch else ''}", *costs))
    parts = ["## Cost scaling", markdown_table(("Model", *(f"{prompts_at_scale(n)} prompts" for n in SCALES)), rows)]
    if scaling.spent:
        parts.append(f"Paid for this collection: {money(scaling.spent.dollars)} for {scaling.spent.prompts:,} prompts.")
    return [*parts, f"{plain_cell(scaling.basis)} {plain_cell(scaling.projection)}"]
