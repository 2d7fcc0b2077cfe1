"""What the numbers say, in sentences: the same ones in the page, the tables and the charts' titles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mlx_distill.records import Generation
from mlx_distill.report.cost import CostScaling
from mlx_distill.report.evidence import Evidence
from mlx_distill.report.intervals import FEW_GROUPS, FEWEST_GROUPS, Estimate
from mlx_distill.report.objective import Objective
from mlx_distill.report.scores import Scorecard
from mlx_distill.report.training import Course
from mlx_distill.report.wording import distance, loss, money, percent, plural, score, signed, span, title_of, visible


@dataclass(frozen=True)
class Note:
    """Something to know before believing a number.

    Attributes:
        command: What brings it, if something is missing.
    """

    text: str
    command: str | None = None


def score_finding(card: Scorecard) -> str | None:
    """What a scorecard says; None where nothing was scored."""
    base, distilled, teacher = (card.overall_of(c) for c in ("base", "distilled", "teacher"))
    if base is None or distilled is None:
        known = ", ".join(f"{title_of(c).lower()} {score(m.value)}" for c, m in card.overall.items())
        return f"Scores out of 10: {known}." if known else None
    against = "" if teacher is None else f"; its teacher scores {score(teacher)}"
    known_to = change_in_words(card.change, signed)
    # Judged as written: a difference that the digits do not show is not claimed.
    before, after = round(base, 1), round(distilled, 1)
    if card.change and card.change.settled is False:
        verb = f"The student scores {score(distilled)} after distillation and {score(base)} before, out of 10"
        known_to = f": not distinguishable{known_to}"
    elif after > before:
        verb = f"Distillation took the student from {score(base)} to {score(distilled)} out of 10"
    elif after < before:
        verb = f"The distilled student scores lower than its base, {score(distilled)} after {score(base)} out of 10"
    else:
        verb = f"Distillation left the student at {score(base)} out of 10"
    return f"{verb}{known_to}{against}."


def change_in_words(change: Estimate | None, show: Callable[[float | None], str], unit: str = "") -> str:
    """A difference with its interval, in brackets; nothing where no interval is known."""
    if change is None or change.interval is None:
        return ""
    return f" ({show(change.value)}{unit}, 95 % interval {span(change.interval, show)})"


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


def minimised_finding(course: Course) -> str | None:
    """Which divergence from the teacher training minimised, and how it moved; None where text alone was learned."""
    found = course.minimised
    if found is None:
        return None
    teacher = f" from {found.teacher}" if found.teacher else ""
    text = f"Training minimised the {found.name}{teacher}"
    if found.best is not None:
        begun = "" if found.first is None else f"{distance(found.first)} → "
        text += f"; on the validation rows it went {begun}{distance(found.best)} nats a token"
    own = " Steps on answers that the student wrote are not among the training rows." if found.own else ""
    return f"{text}.{own}"


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


def few_prompts(card: Scorecard) -> str | None:
    """What the number of prompts means for a scorecard's intervals; None where there are enough."""
    counted = card.change or next(iter(card.overall.values()), None)
    if counted is None or counted.groups >= FEW_GROUPS:
        return None
    n, groups = counted.n, counted.groups
    of = "" if groups == n else f" of {groups} families"
    many = f"{plural(n, 'prompt')}{of} {'is' if n == 1 else 'are'} few"
    if groups < FEWEST_GROUPS:
        return f"{many}: no interval is given, and a difference of this size can be chance."
    return f"{many}: the intervals are narrower than they should be."


def cautions(evidence: Evidence, cards: tuple[Scorecard, ...], objective: Objective | None = None) -> list[Note]:
    """What keeps the numbers from being more than they are."""
    notes: list[Note] = []
    root = evidence.folder.root
    if any(mean.interval for card in cards for mean in card.overall.values()) or objective:
        notes.append(Note("Intervals are of 95 %, by a bootstrap over families of prompts; differences are paired."))
    if objective:
        notes += _cautions_of_tests(objective)
    if cards and (few := few_prompts(cards[0])):
        notes.append(Note(few))
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
    stale, judge = evidence.stale, f"mlx-distill judge {root}"
    for count, one, many, why, command in (
        (stale.verdicts, "verdict", "verdicts", "they judge earlier answers than those shown", judge),
        (stale.duels, "duel", "duels", "they judge earlier answers than those shown", f"{judge} --pairwise"),
        (stale.outcomes, "test result", "test results", "they are of earlier answers or tests", None),
        (stale.losses, "held-out loss", "held-out losses", "they are of other models than those shown", None),
        (stale.calibrations, "calibration", "calibrations", "it is on earlier answers than those shown", None),
    ):
        if count:
            notes.append(Note(f"{count:,} {one if count == 1 else many} left out: {why}.", command))
    notes += [Note(f"{visible(r.contender)}: {text}") for r in evidence.rivals for text in r.differences]
    return notes


def _cautions_of_tests(objective: Objective) -> list[Note]:
    notes = []
    families = len(objective.families)
    if families < FEWEST_GROUPS:
        notes.append(
            Note(f"{plural(families, 'family').replace('familys', 'families')} of tasks: too few for intervals.")
        )
    elif families < FEW_GROUPS:
        notes.append(Note(f"{families} families of tasks are few: intervals are narrower than they should be."))
    total = len(objective.tasks)
    lacking = [f"{title_of(c)} {total - t.tasks}" for c, t in objective.contenders.items() if t.tasks < total]
    if lacking:
        notes.append(Note(f"Of {total} tasks, without a test result: {', '.join(lacking)}. They count as neither."))
    return notes


def missing(
    evidence: Evidence, cards: tuple[Scorecard, ...], course: Course | None, *, tested: bool = False
) -> list[Note]:
    """What a full report would have and this one has not, with the command that brings it."""
    notes: list[Note] = []
    root = evidence.folder.root
    if not cards and not tested:
        notes.append(Note("No answer has been judged yet, so there are no scores.", f"mlx-distill judge {root}"))
    elif cards and not any(card.overall for card in cards):
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
    rivals = {rival.contender for rival in evidence.rivals}
    for contender in (c for c in evidence.contenders if c not in rivals):
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
