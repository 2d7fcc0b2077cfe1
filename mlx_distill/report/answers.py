"""The answers of a comparison, prompt by prompt, ready to be read on a page of bounded size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from mlx_distill.records import Generation, Prompt
from mlx_distill.report import findings
from mlx_distill.report.analysis import Analysis
from mlx_distill.report.diffs import Diff, diff
from mlx_distill.report.figures import ending_title
from mlx_distill.report.prose import MOST_CHARACTERS, render_answer
from mlx_distill.report.scores import JudgeLabel, dimension_title
from mlx_distill.report.wording import duration, plural
from mlx_distill.scores import ScoredAnswer

#: Characters of answers on a page, as they were written and as HTML: with them a page stays below some 6 MB.
MOST_WRITTEN, MOST_HTML = 1_600_000, 3_600_000
#: However many answers there are, each is shown up to here.
FEWEST_CHARACTERS = 600
#: Prompts from which on their answers are folded away at first.
MANY_PROMPTS = 13


@dataclass(frozen=True)
class JudgedAnswer:
    """A judge's scores for one answer, ready to be read."""

    judge: JudgeLabel
    overall: float | None
    scores: Sequence[tuple[str, float, str]]
    problem: str | None


@dataclass(frozen=True)
class TestedAnswer:
    """What the tests made of an answer, ready to be read."""

    passed: bool
    title: str
    detail: str
    figures: str


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
    test: TestedAnswer | None


@dataclass(frozen=True)
class Case:
    """A prompt and all answers to it.

    Attributes:
        change: "gained", "lost", "same", or "" where it is not known: by the tests, else by the first judge.
        tested: "passed" or "failed" by the distilled student's answer, "" where it was not tested.
        marks: By contender, what its answer came to in a word: "passed", "failed", or its score.
    """

    prompt: Prompt
    cards: Sequence[AnswerCard]
    diff: Diff | None
    change: str
    tested: str
    marks: Sequence[tuple[str, str]]


def cases_of(analysis: Analysis) -> list[Case]:
    """Every prompt with its answers; the longest are cut until all fit a page."""
    texts = [g.text for g in analysis.evidence.generations]
    most = _level([len(text) for text in texts], MOST_WRITTEN)
    while True:
        cases = [_case(analysis, prompt, most) for prompt in analysis.evidence.prompts]
        size = sum(len(card.html or "") for case in cases for card in case.cards)
        size += sum(len(case.diff.html) for case in cases if case.diff)
        if size <= MOST_HTML or most <= FEWEST_CHARACTERS:
            return cases
        # What is cut is the longest; how much of the page it makes is not known before.
        most = max(FEWEST_CHARACTERS, min(most // 2, int(most * MOST_HTML / size)))


def _level(lengths: Sequence[int], room: int) -> int:
    """The length at which to cut, for all to fit into the room together."""
    left = room
    for done, length in enumerate(sorted(lengths)):
        share = left // (len(lengths) - done)
        if length > share:
            return max(FEWEST_CHARACTERS, min(MOST_CHARACTERS, share))
        left -= length
    return MOST_CHARACTERS


def _case(analysis: Analysis, prompt: Prompt, most: int) -> Case:
    evidence = analysis.evidence
    cards = [_answer_card(analysis, prompt.id, contender, most) for contender in evidence.contenders]
    base, distilled = (evidence.answer(prompt.id, c) for c in ("base", "distilled"))
    return Case(
        prompt,
        cards,
        diff(base.text, distilled.text, most) if base and distilled else None,
        _change(analysis, prompt.id),
        _tested(evidence.outcome(prompt.id, "distilled")),
        [(card.contender, _mark(card)) for card in cards],
    )


def _answer_card(analysis: Analysis, prompt_id: str, contender: str, most: int) -> AnswerCard:
    evidence = analysis.evidence
    answer = evidence.answer(prompt_id, contender)
    model = evidence.models[contender]
    if answer is None:
        return AnswerCard(contender, model, None, False, None, "", (), None)
    verdicts = []
    for card in analysis.cards:
        verdict = evidence.verdict(card.judge.spec, prompt_id, contender)
        if verdict is not None:
            scores = [(dimension_title(d), s.score, s.rationale) for d, s in verdict.scores.items()]
            verdicts.append(JudgedAnswer(card.judge, verdict.overall, scores, verdict.problem))
    outcome = evidence.outcome(prompt_id, contender)
    return AnswerCard(
        contender,
        model,
        render_answer(answer.text, most, whole=f"The whole answer is in {evidence.folder.generations.name}."),
        not answer.text.strip(),
        findings.stop_flag(answer),
        _figures(answer),
        verdicts,
        _test_result(outcome) if outcome else None,
    )


def _figures(answer: Generation) -> str:
    figures = plural(answer.output_tokens, "token")
    return f"{figures} · {duration(answer.seconds)}" if answer.seconds > 0 else figures


def _test_result(row: ScoredAnswer) -> TestedAnswer:
    outcome = row.outcome
    title = "passed" if outcome.passed else ending_title(outcome.outcome)
    if not row.objective:
        title = f"its own tests: {title}"
    figures = f"{outcome.tests_passed} of {plural(outcome.tests, 'test')}" if outcome.tests else ""
    return TestedAnswer(outcome.passed, title, outcome.detail, figures)


def _tested(row: ScoredAnswer | None) -> str:
    if row is None or not row.objective:
        return ""
    return "passed" if row.outcome.passed else "failed"


def _mark(card: AnswerCard) -> str:
    if card.test is not None:
        return "passed" if card.test.passed else "failed"
    overall = next((v.overall for v in card.verdicts if v.overall is not None), None)
    return "–" if overall is None else f"{overall:.1f}"


def _change(analysis: Analysis, prompt_id: str) -> str:
    """Whether the student does better than its base on a prompt."""
    evidence = analysis.evidence
    before, after = (_tested(evidence.outcome(prompt_id, c)) for c in ("base", "distilled"))
    if before and after:
        return "same" if before == after else "gained" if after == "passed" else "lost"
    for card in analysis.cards:
        row = card.prompts.get(prompt_id, {})
        if {"base", "distilled"} <= row.keys():
            # Judged as written, as in `findings.prompt_finding`.
            moved = round(row["distilled"], 1) - round(row["base"], 1)
            return "gained" if moved > 0.01 else "lost" if moved < -0.01 else "same"
    return ""
