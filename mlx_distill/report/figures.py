"""The tables that the page and `results.md` have in common, as text: what one says, the other says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

from mlx_distill.report.analysis import Analysis
from mlx_distill.report.intervals import Estimate
from mlx_distill.report.losses import Distances
from mlx_distill.report.objective import Group, Objective
from mlx_distill.report.scores import label
from mlx_distill.report.wording import (
    count,
    distance,
    duration,
    nats,
    percent,
    perplexity,
    plural,
    points,
    ratio,
    score,
    signed,
    span,
    title_of,
    visible,
)
from mlx_distill.scores import Ending

Show = Callable[[float | None], str]


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        rows: The first cell is the row's head.
        of: The contender that each row is of, for its colour; empty where rows are of something else.
        columns: The contender that each column is of, likewise.
        note: What has to be known to read it.
        strips: Of each row, shares by contender that are drawn beneath its head.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    of: tuple[str, ...] = ()
    columns: tuple[str | None, ...] = ()
    note: str = ""
    strips: tuple[dict[str, float], ...] = ()

    @property
    def width(self) -> int:
        """About how many letters wide it is."""
        return sum(2 + max(map(len, column)) for column in zip(self.head, *self.rows, strict=True))


def tables_of_tests(analysis: Analysis) -> list[Table]:
    """What hidden tests say: by contender, changes, endings, by difficulty, by family."""
    found = analysis.objective
    if found is None:
        return []
    tables = [_tested(found), _changes(found), _endings(found)]
    if len(found.difficulties) > 1:
        tables.append(_groups("By difficulty", "Difficulty", found.difficulties, found))
    tables.append(_groups("By family", "Family", found.families, found))
    return [table for table in tables if table.rows]


def _tested(found: Objective) -> Table:
    k = found.k
    head = ["Contender", "Tasks", "pass@1", "95 % interval"]
    if k > 1:
        head += [f"pass@{k}", "95 % interval"]
    rows = []
    for contender, tested in found.contenders.items():
        row = [title_of(contender), count(tested.tasks), *_estimate(tested.pass_1, percent)]
        if k > 1:
            row += _estimate(tested.pass_k, percent)
        row += [percent(tested.parses), percent(tested.finishes), f"{tested.tokens:,.0f}"]
        rows.append(tuple(row))
    sampled = f" Each task was answered up to {k} times." if k > 1 else " Each task was answered once."
    return Table(
        "Tasks passed",
        (*head, "Code parses", "Finished", "Mean tokens"),
        tuple(rows),
        tuple(found.contenders),
        note="pass@1: the chance that an answer passes all hidden tests of its task." + sampled,
    )


def _changes(found: Objective) -> Table:
    rows = [
        (
            f"{title_of(c)} − base",
            points(change.value),
            span(change.interval, points),
            count(change.n),
            verdict_on(change),
        )
        for c, change in found.changes.items()
    ]
    gained, lost = len(found.gained), len(found.lost)
    note = ""
    if "distilled" in found.changes:
        note = f"The distilled student passes {plural(gained, 'task')} more often than its base, {lost} less often."
    return Table(
        "What changed",
        ("Difference", "Points of pass@1", "95 % interval", "Tasks", "Verdict"),
        tuple(rows),
        tuple(found.changes),
        note=note,
    )


def _endings(found: Objective) -> Table:
    known = [e for e in get_args(Ending) if any(e in tested.endings for tested in found.contenders.values())]
    rows = tuple(
        (title_of(c), *(count(tested.endings.get(e, 0)) for e in known)) for c, tested in found.contenders.items()
    )
    head = ("Contender", *(ending_title(e) for e in known))
    return Table("How answers ended", head, rows, tuple(found.contenders), note="All answers to tasks, each once.")


def _groups(title: str, first: str, groups: dict[str, Group], found: Objective) -> Table:
    contenders = tuple(found.contenders)
    # A family is one group of tasks: it has no interval of its own.
    known = any(group.change and group.change.interval for group in groups.values())
    rows = []
    for name, group in groups.items():
        change = group.change
        row = [name, count(group.tasks)]
        row += [percent(group.pass_1[c].value if c in group.pass_1 else None) for c in contenders]
        row.append(points(change.value if change else None))
        rows.append((*row, span(change.interval if change else None, points)) if known else tuple(row))
    ends = ("95 % interval",) if known else ()
    return Table(
        title,
        (first, "Tasks", *(title_of(c) for c in contenders), "Change, points", *ends),
        tuple(rows),
        columns=(None, None, *contenders, None, *(None for _ in ends)),
        note="pass@1." if known else "pass@1; a single family of tasks has no interval of its own.",
        strips=tuple({c: mean.value for c, mean in group.pass_1.items()} for group in groups.values()),
    )


def tables_of_losses(analysis: Analysis) -> list[Table]:
    """How likely the students find held-out answers of the teacher, and how far they are from its distribution."""
    found = analysis.losses
    if found is None:
        return []
    rows = [
        (title_of(c), perplexity(f.perplexity), f"{f.nats:.3f}", *_less_is_more(found.changes.get(c)))
        for c, f in found.contenders.items()
    ]
    first = next(iter(found.contenders.values()))
    tables = [
        Table(
            "Perplexity of the teacher's held-out answers",
            ("Contender", "Perplexity", "Nats a token", "Change from base", "95 % interval", "Verdict"),
            tuple(rows),
            tuple(found.contenders),
            note=f"Over {_amount(first.tokens, first.rows)}, the same for all; lower is better.",
        )
    ]
    return tables if found.distances is None else [*tables, _distances(found.distances)]


def _distances(found: Distances) -> Table:
    rows = [(title_of(c), distance(v), *_less_is_more(found.changes.get(c))) for c, v in found.contenders.items()]
    words = "all its words" if found.top_k is None else f"its {found.top_k} likeliest words and all others as one"
    note = (
        f"How far a model's guess at the next word is from that of {visible(found.teacher)}: 0 is that teacher itself, "
        f"lower is nearer. It is the forward KL divergence, KL(teacher‖model), over {words}, at "
        f"{_amount(found.tokens, found.rows)}. What training minimised may be another, and was of other rows."
    )
    if found.elsewhere:
        note += f" Measured against another teacher, and not shown: {', '.join(map(title_of, found.elsewhere))}."
    return Table(
        "Divergence from the teacher on its held-out answers",
        ("Contender", "Nats a token", "Change from base", "95 % interval", "Verdict"),
        tuple(rows),
        tuple(found.contenders),
        note=note,
    )


def _amount(tokens: int, answers: int) -> str:
    return f"{plural(tokens, 'token')} of {plural(answers, 'answer')}"


def _less_is_more(change: Estimate | None) -> Sequence[str]:
    """A change in nats a token, its interval and the verdict on it."""
    return (*_estimate(change, nats), verdict_on(change, less_is_more=True) if change else "–")


def tables_of_pairs(analysis: Analysis) -> list[Table]:
    """What judges prefer who see two answers at a time."""
    rows, biases = [], []
    for pair in analysis.pairs:
        sides = f"{title_of(pair.contender)} against {title_of(pair.opponent).lower()}"
        even = "–" if pair.rate is None else "too few" if pair.rate.interval is None else _better(pair.rate)
        rows.append(
            (
                f"{sides}, by {pair.judge.full}",
                f"{pair.wins} / {pair.ties} / {pair.losses}",
                *_estimate(pair.rate, percent),
                even,
                *_estimate(pair.controlled, percent),
                count(pair.unread),
            )
        )
        biases.append(
            (f"{sides}, by {pair.judge.full}", *_estimate(pair.flips, percent), *_estimate(pair.bias, points))
        )
    if not rows:
        return []
    return [
        Table(
            "Two answers at a time",
            (
                *("Pair and judge", "Win / tie / loss", "Win rate", "95 % interval", "Verdict"),
                *("At equal length", "95 % interval", "Unread"),
            ),
            tuple(rows),
            tuple(pair.contender for pair in analysis.pairs),
            note="Each pair is seen in both orders; preferred in only one of them, it is a tie, which counts half.",
        ),
        Table(
            "How far the order decides",
            ("Pair and judge", "Flip rate", "95 % interval", "Position bias, points", "95 % interval"),
            tuple(biases),
            note="Flip rate: pairs on which the judge says something else once the answers are swapped. Position bias: "
            "verdicts for the answer seen first, less a half; 0 is none.",
        ),
    ]


def tables_of_judges(analysis: Analysis) -> list[Table]:
    """Several judges side by side."""
    if analysis.consensus is None:
        return []
    contenders = analysis.evidence.contenders
    rows = []
    for card in analysis.scored:
        change = card.change
        rows.append(
            (
                card.judge.full,
                *(score(card.overall_of(c)) for c in contenders),
                signed(change.value if change else None),
                span(change.interval if change else None, signed),
                verdict_on(change) if change else "–",
            )
        )
    alpha = analysis.consensus.alpha
    answers = plural(analysis.consensus.answers, "answer")
    agreed = "cannot be told" if alpha is None else ratio(alpha)
    return [
        Table(
            "The judges side by side",
            ("Judge", *(title_of(c) for c in contenders), "Distilled − base", "95 % interval", "Verdict"),
            tuple(rows),
            columns=(None, *contenders, None, None, None),
            note=f"Krippendorff's alpha of the overall scores of {answers}: {agreed} "
            "(1 is agreement, 0 what chance would give).",
        )
    ]


def tables_of_people(analysis: Analysis) -> list[Table]:
    """How far judges agree with people, where people labelled some answers."""
    found = analysis.evidence.calibration
    if found is None or not found.judges:
        return []
    rows = []
    for judge in found.judges:
        own, pairs = judge.overall, judge.pairs
        rows.append(
            (
                label(judge.judge, analysis.evidence).full,
                count(own.n),
                *(ratio(value) for value in (own.pearson, own.spearman, own.kappa)),
                signed(own.gap),
                count(pairs.n) if pairs else "–",
                percent(pairs.agreement if pairs else None),
                ratio(pairs.kappa if pairs else None),
            )
        )
    return [
        Table(
            "Judges beside people",
            (
                *("Judge", "Labels", "Pearson", "Spearman", "Kappa, weighted", "Judge − people"),
                *("Pairs", "Agreement", "Kappa"),
            ),
            tuple(rows),
            note="Overall scores, and which of two answers is better. Kappa is Cohen's: 1 is agreement, 0 chance.",
        )
    ]


def tables_of_answers(analysis: Analysis) -> list[Table]:
    """How much each contender wrote, and how fast."""
    evidence = analysis.evidence
    seconds = evidence.record.seconds if evidence.record else {}
    rows = []
    for contender in evidence.contenders:
        answers = evidence.of(contender)
        speed = evidence.speed(contender)
        rows.append(
            (
                title_of(contender),
                evidence.models[contender],
                count(len(answers)),
                count(sum(not answer.finished for answer in answers)),
                f"{sum(answer.output_tokens for answer in answers) / len(answers):,.0f}",
                "–" if speed is None else f"{speed:.1f}",
                duration(seconds.get(contender)),
            )
        )
    head = ("Contender", "Model", "Answers", "Not ended by itself", "Mean tokens", "Tokens/s", "Time")
    return [Table("Length and speed", head, tuple(rows), evidence.contenders)]


def tables_of_rivals(analysis: Analysis) -> list[Table]:
    """Other runs' students against this one."""
    rows: list[tuple[str, ...]] = []
    of: list[str] = []
    judges = {card.judge.spec: card.judge for card in analysis.cards}
    for versus in analysis.rivals:
        name = f"{versus.rival.contender} − distilled"
        measures: list[tuple[str, Estimate, Show]] = []
        if versus.passes:
            measures.append(("pass@1, points", versus.passes, points))
        measures += [(f"score by {judges[spec].full}", change, signed) for spec, change in versus.scores.items()]
        for measure, change, show in measures:
            row = (show(change.value), span(change.interval, show), count(change.n), verdict_on(change))
            rows.append((f"{name}, {measure}", *row))
            of.append(versus.rival.contender)
    if not rows:
        return []
    head = ("Difference", "Value", "95 % interval", "Prompts", "Verdict")
    note = "Only the prompts that both students answered, paired."
    return [Table("Runs against each other", head, tuple(rows), tuple(of), note=note)]


def verdict_on(change: Estimate, *, less_is_more: bool = False) -> str:
    """Whether a difference is one, in a word or two."""
    if change.settled is None:
        return "too few for an interval"
    if not change.settled:
        return "not distinguishable"
    return "better" if (change.value > 0) != less_is_more else "worse"


def ending_title(ending: str) -> str:
    """How an answer ended, in words."""
    return {
        "no_code": "no code",
        "not_parsed": "does not parse",
        "timeout": "too slow",
        "memory": "too much memory",
        "output": "too much output",
        "processes": "too many processes",
    }.get(ending, ending)


def _better(rate: Estimate) -> str:
    if rate.interval is None or rate.interval.holds(0.5):
        return "not distinguishable"
    return "better" if rate.value > 0.5 else "worse"


def _estimate(found: Estimate | None, show: Show) -> Sequence[str]:
    return (show(found.value if found else None), span(found.interval if found else None, show))
