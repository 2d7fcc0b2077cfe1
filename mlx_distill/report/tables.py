"""`results.md`: the comparison as tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mlx_distill.report import findings
from mlx_distill.report.commands import commands_to_repeat
from mlx_distill.report.cost import SCALES, CostScaling
from mlx_distill.report.evidence import Evidence
from mlx_distill.report.findings import Note
from mlx_distill.report.scores import Scorecard, dimension_title
from mlx_distill.report.settings import settings_of
from mlx_distill.report.training import Course
from mlx_distill.report.wording import (
    change,
    code_cell,
    loss,
    money,
    percent,
    plain_cell,
    prompts_at_scale,
    score,
    title_of,
)


def results(
    evidence: Evidence, cards: tuple[Scorecard, ...], course: Course | None, scaling: CostScaling | None
) -> str:
    """The whole file, as Markdown."""
    parts = [
        f"# {plain_cell(evidence.name)}: results",
        plain_cell(findings.headline(evidence, cards, course)),
        *_notes("What is missing", findings.missing(evidence, cards, course)),
        *_notes("Before you believe it", findings.cautions(evidence, cards)),
        *_training(course),
        *(part for card in cards for part in _scores(card, evidence)),
        *_answers(evidence),
        *_cost(scaling),
        "## Configuration",
        markdown_table(
            ("Setting", "Value"), ((plain_cell(k), code_cell(v)) for k, v in settings_of(evidence)), right=False
        ),
        "## To repeat it",
        "```sh\n" + "\n".join(line.replace("`", "'") for line in commands_to_repeat(evidence)) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


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
    head = ("Epoch", "Train loss", "Train token accuracy", "Valid loss", "Valid token accuracy", "Adapter kept")
    rows = [
        (
            "before" if e.number == 0 else str(e.number),
            loss(e.train_loss),
            percent(e.train_accuracy),
            loss(e.valid_loss),
            percent(e.valid_accuracy),
            "yes" if e.kept else "",
        )
        for e in course.epochs
    ]
    parts = ["## Training progress", markdown_table(head, rows)]
    if course.test:
        parts.append(f"Test: loss {loss(course.test.loss)}, token accuracy {percent(course.test.token_accuracy)}.")
    return [*parts, "![Training curves](training_curves.png)"]


def _scores(card: Scorecard, evidence: Evidence) -> list[str]:
    contenders = evidence.contenders
    head = [title_of(c) for c in contenders] + ["Distilled − base"]
    if not card.overall:
        return [f"## Scorecard by {plain_cell(card.judge.full)}", "No verdict could be read."]
    dimensions = [
        (dimension_title(d), *_row({c: m.value for c, m in means.items()}, contenders))
        for d, means in card.dimensions.items()
    ]
    overall = {c: m.value for c, m in card.overall.items()}
    total = ("**Overall**", *(f"**{cell}**" for cell in _row(overall, contenders)))
    counted = ", ".join(f"{title_of(c).lower()} {m.n}" for c, m in card.overall.items())
    prompts = [(code_cell(p), *_row(row, contenders)) for p, row in card.prompts.items()]
    parts = [
        f"## Scorecard by {plain_cell(card.judge.full)}",
        f"Means of scores from 0 to 10; answers scored: {counted}.",
        markdown_table(["Dimension", *head], [*dimensions, total]),
    ]
    share = findings.gap_closed(card)
    if share is not None:
        parts.append(f"Share of the gap to the teacher that was closed: {share * 100:.0f} %.")
    return [
        *parts,
        f"### Prompt by prompt, by {plain_cell(card.judge.full)}",
        markdown_table(["Prompt", *head], prompts),
    ]


def _row(values: dict[str, float], contenders: Sequence[str]) -> tuple[str, ...]:
    both = "base" in values and "distilled" in values
    difference = values["distilled"] - values["base"] if both else None
    return (*(score(values.get(c)) for c in contenders), change(difference))


def _answers(evidence: Evidence) -> list[str]:
    rows = []
    for contender in evidence.contenders:
        answers = evidence.of(contender)
        tokens = sum(a.output_tokens for a in answers)
        speed = evidence.speed(contender)
        rows.append(
            (
                title_of(contender),
                code_cell(evidence.models[contender]),
                str(len(answers)),
                str(sum(not a.finished for a in answers)),
                f"{tokens / len(answers):,.0f}",
                "–" if speed is None else f"{speed:.1f}",
            )
        )
    head = ("Contender", "Model", "Answers", "Not ended by itself", "Mean tokens", "Tokens/s")
    parts = ["## Answers", markdown_table(head, rows)]
    flagged = [
        f"- {code_cell(a.prompt.id)}, {title_of(a.contender).lower()}: {findings.stop_flag(a)}"
        for a in evidence.generations
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
