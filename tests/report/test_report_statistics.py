"""What the report says of tests, losses, duels and judges is what follows from the records, worked out by hand."""

from __future__ import annotations

import math
import re

import pytest

from mlx_distill.calibration import Calibration, JudgeCalibration, PairAgreement, ScoreAgreement
from mlx_distill.layout import append_row, file_sha256, write_text
from mlx_distill.report.analysis import analyse, headline
from mlx_distill.report.evidence import read_evidence
from mlx_distill.report.figures import tables_of_losses, tables_of_pairs, tables_of_people, tables_of_tests
from mlx_distill.report.intervals import estimate
from mlx_distill.scores import Duel
from mlx_distill.stats import bootstrap_interval, length_controlled_win_rate, share_interval


def analysis_of(made):
    return analyse(read_evidence(made.write()))


def never(_number, _sample):
    return False


def test_pass_at_1_by_hand(project):
    found = analysis_of(project(prompts=12, tested=12)).objective
    assert found.k == 1
    # Base passes 0, 3, 6, 9; distilled these and 2, 5, 8, 11.
    assert {c: t.pass_1.value for c, t in found.contenders.items()} == pytest.approx(
        {"base": 4 / 12, "distilled": 8 / 12, "teacher": 1.0}
    )
    assert found.gained == ("task-2", "task-5", "task-8", "task-11")
    assert found.lost == ()
    change = found.change
    assert (change.value, change.n, change.groups) == (pytest.approx(4 / 12), 12, 6)
    differences = [float(n % 3 == 2) for n in range(12)]
    assert change.interval == bootstrap_interval(differences, groups=[f"family-{n % 6}" for n in range(12)])
    passed = [float(n % 3 == 0) for n in range(12)]
    by_family = share_interval(passed, groups=[f"family-{n % 6}" for n in range(12)])
    assert found.contenders["base"].pass_1.interval == by_family


def test_samples_count_for_pass_at_k_alone(project):
    # Two answers to each of 10 tasks: of the base's only the second passes, on every second task.
    passes = {"base": lambda n, s: n % 2 == 0 and s == 1, "distilled": lambda n, s: True, "teacher": lambda n, s: True}
    found = analysis_of(project(prompts=10, tested=10, samples=2, passes=passes))
    tests = found.objective
    assert tests.k == 2
    assert tests.contenders["base"].answers == 20
    assert tests.contenders["base"].pass_1.value == pytest.approx(0.25)
    assert tests.contenders["base"].pass_k.value == pytest.approx(0.5)
    assert tests.contenders["teacher"].pass_k is None
    # What is shown is the first answer.
    assert not found.evidence.outcome("task-0", "base").outcome.passed
    assert len(found.evidence.generations) == 30
    table = tables_of_tests(found)[0]
    assert table.head[:6] == ("Contender", "Tasks", "pass@1", "95 % interval", "pass@2", "95 % interval")
    assert table.rows[0][:3] == ("Base", "10", "25.0 %")
    assert table.rows[2][4:6] == ("–", "–")


def test_endings_families_and_difficulties(project):
    found = analysis_of(project(prompts=12, tested=12))
    tables = {table.title: table for table in tables_of_tests(found)}
    # Base fails 8 of 12: 5 and 10 are too slow.
    assert tables["How answers ended"].head == ("Contender", "passed", "failed", "too slow")
    assert tables["How answers ended"].rows[0] == ("Base", "4", "6", "2")
    families = {row[0]: row[1:] for row in tables["By family"].rows}
    assert families["family-2"] == ("2", "0.0 %", "100.0 %", "100.0 %", "+100.0")
    assert families["family-0"] == ("2", "100.0 %", "100.0 %", "100.0 %", "±0.0")
    easy = next(row for row in tables["By difficulty"].rows if row[0] == "easy")
    # 0, 1, 4, 5, 8, 9 are easy: base passes 0 and 9, distilled 5 and 8 as well.
    assert easy[1:4] == ("6", "33.3 %", "66.7 %")


@pytest.mark.parametrize("what", ["answer_sha256", "task_sha256"])
def test_a_result_of_another_answer_or_task_is_never_shown(project, what):
    made = project(prompts=8, tested=8)
    root = made.write()
    changed = [row.model_copy(update={what: "f" * 64}) if row.contender == "base" else row for row in made.outcomes()]
    made.folder.outcomes.write_text("".join(row.to_json() + "\n" for row in changed))
    found = analyse(read_evidence(root))
    assert list(found.objective.contenders) == ["distilled", "teacher"]
    assert found.evidence.stale.outcomes == 8
    assert any("8 test results left out" in note.text for note in found.cautions)
    # Made again, each counts.
    for row in made.outcomes():
        append_row(made.folder.outcomes, row)
    found = analyse(read_evidence(root))
    assert found.objective.contenders["base"].tasks == 8
    assert found.evidence.stale.outcomes == 0


def test_tasks_without_a_result_are_counted_as_neither(project):
    made = project(prompts=10, tested=10)
    root = made.write()
    kept = [row for row in made.outcomes() if (row.contender, row.outcome.task_id) != ("distilled", "task-2")]
    made.folder.outcomes.write_text("".join(row.to_json() + "\n" for row in kept))
    found = analyse(read_evidence(root))
    assert found.objective.contenders["distilled"].pass_1.value == pytest.approx(6 / 9)
    assert found.objective.change.n == 9
    assert any("without a test result: Distilled 1" in note.text for note in found.cautions)


def test_perplexity_and_its_change(project):
    base, distilled = [20.0, 30.0, 75.0, 44.0, 90.0, 61.0], [15.0, 25.0, 60.0, 41.0, 70.0, 60.0]
    found = analysis_of(project(held_out={"base": base, "distilled": distilled}))
    tokens = 10 + 20 + 30 + 40 + 50 + 60
    losses = found.losses
    assert losses.contenders["base"].perplexity == pytest.approx(math.exp(sum(base) / tokens))
    change = losses.changes["distilled"]
    assert change.value == pytest.approx((sum(distilled) - sum(base)) / tokens)
    assert (change.n, change.groups) == (tokens, 6)
    # Tokens of a row are drawn together: the ratio of sums is resampled, not the mean of the rows' means.
    shares = [(d - b) / t for b, d, t in zip(base, distilled, (10, 20, 30, 40, 50, 60), strict=True)]
    spread = [share for share, t in zip(shares, (10, 20, 30, 40, 50, 60), strict=True) for _ in range(t)]
    rows = [row for row, t in enumerate((10, 20, 30, 40, 50, 60)) for _ in range(t)]
    assert change.interval == bootstrap_interval(spread, groups=rows)
    assert change.interval.low < change.value < change.interval.high < 0
    row = tables_of_losses(found)[0].rows[1]
    assert row[-1] == "better"
    assert row[3].startswith("−")


def test_losses_are_compared_on_the_rows_that_both_read(project):
    made = project(held_out={"base": [20.0, 30.0, 500.0], "distilled": [10.0, 20.0]})
    assert analysis_of(made).losses.contenders["base"].nats == pytest.approx(50 / 30)


def test_losses_of_another_model_are_left_out(project):
    made = project(held_out={"base": [20.0], "distilled": [10.0]})
    root = made.write()
    other = [row.model_copy(update={"model": "elsewhere"}) for row in made.losses()]
    made.folder.held_out.write_text("".join(row.to_json() + "\n" for row in other))
    found = analyse(read_evidence(root))
    assert found.losses is None
    assert found.evidence.stale.losses == 2


def test_duels_by_hand(project):
    says = [
        ("first", "second"),
        ("first", "first"),
        ("second", "first"),
        ("tie", "tie"),
        ("first", "tie"),
        (None, "tie"),
    ]
    made = project(
        prompts=6, duels={"openai:gpt-5": lambda n: says[n]}, answers={("task-0", "distilled"): "longer " * 99}
    )
    found = analysis_of(made)
    (pair,) = found.pairs
    assert (pair.contender, pair.opponent) == ("distilled", "base")
    assert (pair.wins, pair.ties, pair.losses, pair.unread) == (1, 3, 1, 1)
    assert pair.rate.value == 0.5
    # Of five pairs read in both orders, the second and the fifth change with the order.
    assert pair.flips.value == pytest.approx(2 / 5)
    # Verdicts for a side: first, second; first, first; second, first; first. Five of seven for what is seen first.
    assert pair.bias.value == pytest.approx(5 / 7 - 0.5)
    texts = {c: [found.evidence.answer(f"task-{n}", c).text for n in range(5)] for c in ("distilled", "base")}
    lengths = [len(d) - len(b) for d, b in zip(texts["distilled"], texts["base"], strict=True)]
    expected = length_controlled_win_rate([1, 0.5, 0, 0.5, 0.5], lengths, [f"task-{n}" for n in range(5)])
    assert pair.controlled.interval == expected
    assert tables_of_pairs(found)[0].rows[0][1] == "1 / 3 / 1"


def test_a_duel_over_another_answer_is_left_out(project):
    made = project(prompts=6, duels={"openai:gpt-5": lambda _n: ("first", "second")})
    root = made.write()
    rows = [row.model_copy(update={"second_sha256": "f" * 64}) for row in made.duel_rows()[:2]]
    made.folder.duels.write_text("".join(row.to_json() + "\n" for row in [*rows, *made.duel_rows()[2:]]))
    found = analyse(read_evidence(root))
    assert found.pairs[0].wins == 5
    assert found.evidence.stale.duels == 2
    append_row(made.folder.duels, Duel(**made.duel_rows()[0].model_dump()))
    assert analyse(read_evidence(root)).evidence.stale.duels == 1


def test_judges_that_say_the_same_agree(project):
    found = analysis_of(project(prompts=3, judges=("openai:gpt-5", "rubric")))
    assert found.consensus.alpha == pytest.approx(1.0)
    assert found.consensus.answers == 9
    assert analysis_of_one_judge(project).consensus is None


def test_judges_held_against_people_are_shown_with_the_answers_that_were_labelled(project):
    made = project(prompts=2)
    root = made.write()
    held = ScoreAgreement(n=6, pearson=0.5, spearman=-0.25, gap=1.5)
    record = Calibration(
        labels="labels.jsonl",
        labels_sha256="0" * 64,
        generations_sha256=file_sha256(made.folder.generations),
        rows=6,
        judges=(JudgeCalibration(judge="rubric", overall=held, pairs=PairAgreement(n=4, agreement=0.75)),),
    )
    write_text(made.folder.calibration, record.to_json())
    found = analyse(read_evidence(root))
    (table,) = tables_of_people(found)
    assert table.rows[0][1:] == ("6", "0.50", "−0.25", "–", "+1.50", "4", "75.0 %", "–")
    append_row(made.folder.generations, made.generations()[0])
    found = analyse(read_evidence(root))
    assert tables_of_people(found) == []
    assert any("1 calibration left out" in note.text for note in found.cautions)


def analysis_of_one_judge(project):
    made = project(prompts=3)
    made.folder.verdicts.write_text("".join(row.to_json() + "\n" for row in made.verdicts()))
    return analyse(read_evidence(made.folder.root))


def test_a_judge_of_the_teacher_s_family_comes_after_others_and_is_named_so(project, read):
    judges = ("anthropic:claude-opus-4-6", "openai:gpt-5", "rubric")
    made = project(prompts=6, judges=judges, teacher="anthropic:claude-sonnet-4-6",
                   duels={"anthropic:claude-opus-4-6": lambda _n: ("first", "second")})  # fmt: skip
    told = read(made)
    cards = analyse(read_evidence(made.folder.root)).cards
    assert [card.judge.spec for card in cards] == ["openai:gpt-5", "anthropic:claude-opus-4-6", "rubric"]
    assert [card.judge.kin for card in cards] == [False, True, False]
    assert told.results.count("claude-opus-4-6 (a model's opinion, of the teacher's own family)") >= 4


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (
            {"prompts": 24, "tested": 24, "families": 7},
            "took the student from 33.3 % to 66.7 % of 24 tasks passed (+33.3 points, 95 %",
        ),
        ({"prompts": 24, "tested": 19}, "took the student from"),
        (
            {"prompts": 24, "tested": 24, "passes": {"base": never, "distilled": never}},
            "not distinguishable (±0.0 points",
        ),
        ({"prompts": 24, "tested": 24, "families": 3}, "of 24 tasks passed; its teacher passes 100.0 %"),
        ({"prompts": 8, "judges": ("rubric", "openai:gpt-5")}, "(judge: gpt-5)"),
    ],
)
def test_the_headline_rests_on_tests_then_on_models_then_on_the_rubric(project, choices, said):
    if "passes" in choices:
        choices["passes"] = {**choices["passes"], "teacher": lambda n, s: True}
    found = analysis_of(project(**choices))
    text = headline(found)
    assert said in text
    assert ("tasks" in text) == (choices.get("tested", 0) >= 20)


def test_a_difference_of_scores_that_can_be_chance_is_called_so(project):
    made = project(prompts=8)
    root = made.write()
    rows = []
    for number, verdict in enumerate(made.verdicts()):
        shift = (3.0 if number % 2 else -3.0) if verdict.contender == "distilled" else 0.0
        scores = {d: s.model_copy(update={"score": min(10.0, max(0.0, 5 + shift))}) for d, s in verdict.scores.items()}
        rows.append(verdict.model_copy(update={"scores": scores}))
    made.folder.verdicts.write_text("".join(row.to_json() + "\n" for row in rows))
    found = analyse(read_evidence(root))
    change = found.cards[0].change
    assert change.settled is False
    assert "not distinguishable (" in headline(found)


def test_page_tables_and_headline_agree(project, read):
    made = project(
        prompts=24,
        tested=24,
        judges=("openai:gpt-5", "rubric"),
        held_out={"base": [9.0] * 6, "distilled": [8.0] * 6},
        duels={"openai:gpt-5": lambda n: ("first", "second" if n % 3 else "first")},
    )
    told = read(made)
    found = analyse(read_evidence(made.folder.root))
    sentence = headline(found, judged=False)
    assert sentence in told.results
    plain = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", told.page)).replace("&#39;", "'")
    assert sentence in plain
    for table in (*tables_of_tests(found), *tables_of_losses(found), *tables_of_pairs(found)):
        for row in table.rows:
            assert "| " + " | ".join(row) + " |" in told.results
            assert " ".join(row) in plain, row


def test_no_interval_where_groups_are_few():
    assert estimate([1.0, 2.0, 3.0, 4.0], ["a", "b", "c", "d"]).interval is None
    assert estimate([1.0] * 50, ["a"] * 50).interval is None
    assert estimate([1.0, 2.0, 3.0, 4.0, 5.0], list("abcde")).interval is not None
    assert estimate([], []) is None
