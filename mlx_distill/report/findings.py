"""What the numbers say, in sentences: the same ones in the page, the tables and the charts' titles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_distill.records import Generation
from mlx_distill.report.cost import CostScaling
from mlx_distill.report.evidence import Evidence
from mlx_distill.report.scores import Scorecard
from mlx_distill.report.training import Course
from mlx_distill.report.wording import loss, money, percent, plural, score, title_of, visible

FEW_PROMPTS = 30


@dataclass(frozen=True)
class Note:
    """Something to know before believing a number.

    Attributes:
        command: What brings it, if something is missing.
    """

    text: str
    command: str | None = None


def headline(evidence: Evidence, cards: Sequence[Scorecard], course: Course | None) -> str:
    """What changed, in one sentence."""
    scored = [card for card in cards if card.overall]
    if scored and (finding := score_finding(scored[0])):
        return attributed(finding, scored)
    if course and (finding := training_finding(course)):
        return f"{finding.partition(',')[0]}; the answers have not been judged yet."
    who = ", ".join(title_of(c).lower() for c in evidence.contenders)
    return f"{plural(len(evidence.prompts), 'prompt')} answered by {who}, not judged yet."


def score_finding(card: Scorecard) -> str | None:
    """What a scorecard says; None where nothing was scored."""
    base, distilled, teacher = (card.overall_of(c) for c in ("base", "distilled", "teacher"))
    if base is None or distilled is None:
        known = ", ".join(f"{title_of(c).lower()} {score(m.value)}" for c, m in card.overall.items())
        return f"Scores out of 10: {known}." if known else None
    against = "" if teacher is None else f"; its teacher scores {score(teacher)}"
    # Judged as written: a difference that the digits do not show is not claimed.
    before, after = round(base, 1), round(distilled, 1)
    if after > before:
        verb = f"Distillation took the student from {score(base)} to {score(distilled)} out of 10"
    elif after < before:
        verb = f"The distilled student scores lower than its base, {score(distilled)} after {score(base)} out of 10"
    else:
        verb = f"Distillation left the student at {score(base)} out of 10"
    return f"{verb}{against}."


def attributed(finding: str, cards: Sequence[Scorecard]) -> str:
    """The finding of the first scorecard; where there are several, it says whose scores it rests on."""
    return f"{finding.rstrip('.')} (judge: {cards[0].judge.short})." if len(cards) > 1 else finding


def gap_closed(card: Scorecard) -> float | None:
    """How much of the way from base to teacher the student went; None where there is no way to go or it went back."""
    base, distilled, teacher = (card.overall_of(c) for c in ("base", "distilled", "teacher"))
    if base is None or distilled is None or teacher is None or teacher - base < 0.05 or distilled < base:
        return None
    return (distilled - base) / (teacher - base)


def prompt_finding(card: Scorecard) -> str | None:
    """On how many prompts the student gained."""
    changes = [round(r["distilled"], 1) - round(r["base"], 1) for r in card.prompts.values() if r.keys() >= _PAIR]
    if not changes:
        return None
    gained, lost = sum(c > 0.01 for c in changes), sum(c < -0.01 for c in changes)
    same = len(changes) - gained - lost
    parts = [f"scores higher than its base on {gained} of {plural(len(changes), 'prompt')}"]
    if lost:
        parts.append(f"lower on {lost}")
    if same:
        parts.append(f"the same on {same}")
    return f"The distilled student {', '.join(parts)}."


_PAIR = {"base", "distilled"}


def training_finding(course: Course) -> str | None:
    """How loss and token accuracy moved on the held-out split, or else on the training rows."""
    if course.first and course.best and course.best.step > course.first.step:
        a, b, where = course.first, course.best, "Validation loss"
        return (
            f"{where} {_moved(a.loss, b.loss)} from {loss(a.loss)} to {loss(b.loss)}, token accuracy "
            f"from {percent(a.token_accuracy)} to {percent(b.token_accuracy)}."
        )
    known = [(e.train_loss, e.train_accuracy) for e in course.epochs if e.train_loss is not None]
    if len(known) > 1:
        (first, first_accuracy), (last, last_accuracy) = known[0], known[-1]
        assert first is not None and last is not None
        return (
            f"Training loss {_moved(first, last)} from {loss(first)} in the first epoch to {loss(last)} in the last, "
            f"token accuracy from {percent(first_accuracy)} to {percent(last_accuracy)}."
        )
    return None


def _moved(before: float, after: float) -> str:
    return "fell" if after < before else "rose" if after > before else "stayed"


def cost_finding(scaling: CostScaling) -> str:
    """What the next scale up would cost."""
    cheapest, dearest = scaling.models[-1], scaling.models[0]
    low = cheapest.cost(scaling.averages, 1_000_000, batch=True)
    high = dearest.cost(scaling.averages, 1_000_000)
    if scaling.of_teacher:
        return f"A million prompts to {dearest.name} would cost {money(high)}, in batches {money(low)}."
    return f"A million answers of this length would cost between {money(low)} and {money(high)}."


def stop_flag(answer: Generation) -> str | None:
    """Why an answer is not whole; None for one that ended by itself."""
    if answer.finished:
        return None
    return {
        "length": f"cut at {answer.max_tokens:,} tokens",
        "refusal": "refused",
        "context": "cut: the context was full",
    }.get(answer.stop, "stopped before its end")


def cut_counts(evidence: Evidence) -> dict[str, tuple[int, int]]:
    """(unfinished answers, all answers) by contender."""
    return {c: (sum(not a.finished for a in evidence.of(c)), len(evidence.of(c))) for c in evidence.contenders}


def cautions(evidence: Evidence, cards: tuple[Scorecard, ...]) -> list[Note]:
    """What keeps the scores from being more than they are."""
    notes: list[Note] = []
    n = len(evidence.prompts)
    if cards and n < FEW_PROMPTS:
        notes.append(
            Note(
                f"{plural(n, 'prompt')} {'is' if n == 1 else 'are'} few: no interval is given yet, "
                "and a difference of this size can be chance."
            )
        )
    for card in cards:
        notes.append(Note(f"Judge: {visible(card.judge.full)}."))
        if card.unread:
            notes.append(
                Note(
                    f"{plural(len(card.unread), 'verdict')} of {visible(card.judge.short)} could not be read; "
                    "they are missing from its means, not counted as zero."
                )
            )
        if card.unjudged:
            notes.append(
                Note(
                    f"{plural(card.unjudged, 'answer')} not judged by {visible(card.judge.short)} yet.",
                    f"mlx-distill judge {evidence.folder.root} --judge {card.judge.spec}",
                )
            )
    cut = [f"{title_of(c).lower()} {k} of {n}" for c, (k, n) in cut_counts(evidence).items() if k]
    if cut:
        notes.append(
            Note(f"Answers that did not end by themselves: {', '.join(cut)}. They are flagged, and judged as they are.")
        )
    if evidence.stale:
        notes.append(
            Note(
                f"{plural(evidence.stale, 'verdict')} left out: they judge earlier answers than those shown.",
                f"mlx-distill judge {evidence.folder.root}",
            )
        )
    return notes


def missing(evidence: Evidence, cards: tuple[Scorecard, ...], course: Course | None) -> list[Note]:
    """What a full report would have and this one has not, with the command that brings it."""
    notes: list[Note] = []
    root = evidence.folder.root
    if not cards:
        notes.append(Note("No answer has been judged yet, so there are no scores.", f"mlx-distill judge {root}"))
    elif not any(card.overall for card in cards):
        notes.append(Note("No verdict could be read, so there are no scores.", f"mlx-distill judge {root}"))
    run = str(evidence.run_path or (evidence.record.run if evidence.record else f"adapters/{evidence.name}"))
    for contender in ("base", "distilled"):
        if contender not in evidence.contenders:
            notes.append(
                Note(
                    f"No answers of the {contender} student.", f"mlx-distill compare {run} --prompts FILE --out {root}"
                )
            )
    if "teacher" not in evidence.contenders:
        notes.append(
            Note(
                "No teacher was asked, so there is nothing to show how far the student has to go.",
                f"mlx-distill compare {run} --prompts FILE --teacher SPEC --out {root}",
            )
        )
    expected = len(evidence.prompts)
    for contender in evidence.contenders:
        if lacking := expected - len(evidence.of(contender)):
            notes.append(Note(f"{plural(lacking, 'prompt')} without an answer of {title_of(contender).lower()}."))
    return notes + _missing_of_run(evidence, course, run)


def _missing_of_run(evidence: Evidence, course: Course | None, run: str) -> list[Note]:
    notes: list[Note] = []
    if evidence.run is None:
        notes.append(Note(f"The training run was not found ({run}), so its curves and settings are not shown."))
        return notes
    if evidence.run.status != "finished":
        notes.append(Note("The training run has not finished: its numbers are those so far."))
    if course is None:
        notes.append(Note("The run left no metrics, so there are no training curves."))
    if course is not None and not course.valid:
        notes.append(Note("The data set has no validation split, so the curves show training rows alone."))
    if "test" not in evidence.run.splits:
        notes.append(Note("The data set has no test split, so there is no final test loss."))
    if evidence.manifest is None:
        notes.append(Note("The data set has no manifest, so its teacher and its cost are not known."))
    return notes
