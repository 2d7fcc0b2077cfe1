"""The numbers in the tables are those that follow from the records."""

from __future__ import annotations

import re
from statistics import fmean

import pytest

from mlx_distill.pricing import listed_prices, price_of
from mlx_distill.records import Usage
from mlx_distill.report import wording
from mlx_distill.report.cost import SCALES, cost_scaling
from mlx_distill.report.evidence import read_evidence
from mlx_distill.report.findings import gap_closed, score_finding
from mlx_distill.report.scores import scorecards
from mlx_distill.report.training import course_of, epoch_ends, smooth


def table(markdown: str, heading: str) -> dict[str, list[str]]:
    """The rows of the first table under a heading, by their first cell."""
    part = markdown.split(f"{heading}\n", 1)[1]
    rows = re.findall(r"^\|(.+)\|$", part.split("\n\n#", 1)[0], flags=re.M)
    cells = [[cell.strip().strip("*`") for cell in row.split("|")] for row in rows[2:]]
    return {row[0]: row[1:] for row in cells}


@pytest.fixture
def made(project):
    return project(prompts=3, cut={("task-2", "base")})


@pytest.fixture
def markdown(made, read):
    return read(made).results


def test_the_scorecard(made, markdown):
    verdicts = made.verdicts()
    rows = table(markdown, "## Scorecard by rubric (a rubric, not a model's opinion)")
    for dimension, title in (("correctness", "Code Correctness"), ("completeness", "Completeness")):
        means = {
            c: fmean(v.scores[dimension].score for v in verdicts if v.contender == c)
            for c in ("base", "distilled", "teacher")
        }
        change = f"{means['distilled'] - means['base']:+.1f}"
        # Three prompts are too few for an interval.
        assert rows[title] == [f"{m:.1f}" for m in means.values()] + [change, "–"]
    overall = {c: fmean(v.overall for v in verdicts if v.contender == c) for c in ("base", "distilled", "teacher")}
    assert rows["Overall"][:3] == [f"{m:.1f}" for m in overall.values()]
    share = (overall["distilled"] - overall["base"]) / (overall["teacher"] - overall["base"])
    assert f"gap to the teacher that was closed: {share * 100:.0f} %" in markdown


def test_prompt_by_prompt(made, markdown):
    rows = table(markdown, "### Prompt by prompt, by rubric (a rubric, not a model's opinion)")
    assert list(rows) == ["task-0", "task-1", "task-2"]
    for verdict in made.verdicts():
        column = ("base", "distilled", "teacher").index(verdict.contender)
        assert rows[verdict.prompt_id][column] == f"{verdict.overall:.1f}"


def test_training_progress_weighs_steps_by_their_tokens(made, markdown):
    rows = table(markdown, "## Training progress")
    assert list(rows) == ["before", "1", "2"]
    steps = [row for row in made.metrics() if row.kind == "step"]
    for epoch, of_epoch in (("1", steps[:4]), ("2", steps[4:])):
        tokens = sum(row.target_tokens for row in of_epoch)
        mean = sum(row.loss * row.target_tokens for row in of_epoch) / tokens
        assert rows[epoch][0] == f"{mean:.3f}"
    assert [rows[e][2] for e in rows] == ["1.600", "1.400", "1.300"]
    assert [rows[e][4] for e in rows] == ["", "", "yes"]
    assert "Test: loss 1.350, token accuracy 63.0 %." in markdown


def test_cut_answers_are_counted_and_named(markdown):
    rows = table(markdown, "## Answers")
    assert rows["Base"][1:] == ["3", "1", "48", "41.5", "–"]
    assert rows["Distilled"][1:] == ["3", "0", "40", "–", "–"]
    assert "- `task-2`, base: cut at 64 tokens" in markdown


def test_cost_of_a_priced_teacher_scales_the_provider_s_own_count(project, read):
    usage = Usage(input_tokens=15_000, output_tokens=100_000)
    made = project(teacher="anthropic:claude-sonnet-4-6", usage=usage, cost_usd=1.545)
    markdown = read(made).results
    price = price_of("anthropic:claude-sonnet-4-6")
    assert price is not None
    one = price.cost(usage) / 100  # of 100 answers
    rows = table(markdown, "## Cost scaling")
    assert list(rows) == ["claude-sonnet-4-6", "claude-sonnet-4-6, in batches"]
    assert rows["claude-sonnet-4-6"] == [wording.money(one * n) for n in SCALES]
    assert rows["claude-sonnet-4-6, in batches"] == [wording.money(one * n / 2) for n in SCALES]
    assert "Paid for this collection: $1.54 for 100 prompts." in markdown
    assert "counted by the provider" in markdown


def test_cost_of_a_recorded_teacher_is_shown_with_listed_models_and_says_so(markdown):
    rows = table(markdown, "## Cost scaling")
    assert len(rows) == 2 * len(listed_prices())
    # 100 tokens in and 400 out a row, from the sizes of the splits.
    each = Usage(input_tokens=100, output_tokens=400)
    assert rows["claude-opus-4-6"][2] == wording.money(listed_prices()["claude-opus-4-6"].cost(each) * 1e6)
    assert "the teacher is recorded and cost nothing" in markdown
    assert "counted with the student's tokenizer" in markdown
    assert "Paid" not in markdown


def test_a_teacher_on_this_machine_costs_nothing_and_is_shown_with_listed_models(project, read):
    markdown = read(project(teacher="mlx:some/teacher")).results
    assert len(table(markdown, "## Cost scaling")) == 2 * len(listed_prices())
    assert "the teacher answers on a machine of its user's, for no price" in markdown


def test_without_a_run_the_cost_rests_on_the_answers_shown(project):
    scaling = cost_scaling(read_evidence(project(with_run=False).write()))
    assert scaling is not None
    assert (scaling.averages.input_tokens, scaling.averages.output_tokens, scaling.averages.answers) == (None, 40, 2)
    assert "not counted" in scaling.basis


def test_without_any_tokens_there_is_no_cost(project):
    assert cost_scaling(read_evidence(project(with_run=False, contenders=("base", "distilled")).write())) is None


@pytest.mark.parametrize(
    ("scores", "said", "closed"),
    [
        ({"base": 3.0, "distilled": 5.0, "teacher": 8.0}, "took the student from 3.5 to 5.5", 0.4),
        ({"base": 5.0, "distilled": 3.0, "teacher": 8.0}, "scores lower than its base, 3.5 after 5.5", None),
        ({"base": 5.0, "distilled": 5.02, "teacher": 8.0}, "left the student at 5.5", 0.02 / 3),
        ({"base": 5.0, "distilled": 6.0, "teacher": 4.0}, "from 5.5 to 6.5", None),
    ],
)
def test_the_finding_claims_what_the_digits_show(project, scores, said, closed):
    card = scorecards(read_evidence(project(scores=scores).write()))[0]
    assert said in (score_finding(card) or "")
    assert gap_closed(card) == (None if closed is None else pytest.approx(closed))


def test_a_step_noted_twice_counts_once(project):
    made = project()
    root = made.write()
    with made.run.metrics.open("a") as file:
        file.write(made.metrics()[3].model_copy(update={"loss": 9.0}).to_json() + "\n")
    course = course_of(read_evidence(root))
    assert course is not None
    assert [row.step for row in course.steps] == list(range(1, 9))
    assert course.steps[3].loss == 9.0
    assert epoch_ends(course) == [(1, 4), (2, 8)]


def test_smoothing_keeps_length_ends_and_straight_lines():
    line = [float(i) for i in range(10)]
    assert smooth(line, 5) == pytest.approx(line)
    assert smooth([3.0], 5) == [3.0]
    assert smooth([0.0, 9.0, 0.0], 3) == [0.0, 3.0, 0.0]


@pytest.mark.parametrize(
    ("dollars", "text"),
    [(0.0, "$0.00"), (0.0042, "$0.0042"), (1.61, "$1.61"), (154.8, "$155"), (248_160, "$248,160"), (None, "–")],
)
def test_money(dollars, text):
    assert wording.money(dollars) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.94, "59.9 s"), (60, "1 min 0 s"), (1480, "24 min 40 s"), (7_265, "2 h 1 min")],
)
def test_duration(seconds, text):
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(104, "104"), (10_000, "10 thousand"), (16_000_000, "16 million")])
def test_scale_names(number, text):
    assert wording.prompts_at_scale(number) == text
