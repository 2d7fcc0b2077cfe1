"""Answers two by two: both orders, blind, no luck in the order, the same said of the same, and counted as it is."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mlx_distill.cli.main import main
from mlx_distill.config import JudgeConfig
from mlx_distill.errors import ConfigError
from mlx_distill.judges.base import Pair
from mlx_distill.judges.duels import drawn, duel, pairs_of
from mlx_distill.judges.run import Judged, judge_all
from mlx_distill.layout import ComparisonFolder, append_row, read_rows
from mlx_distill.records import Request
from mlx_distill.scores import Duel
from mlx_distill.verdicts import fitting_duels, settled
from tests.judges.judging import (
    Panellist,
    answers_in,
    by_quality,
    choice,
    comparison,
    generation,
    judge_of,
    question_of,
    refusal,
    scores,
)

ANSWERS = {
    ("one", "base"): "quality 2", ("one", "distilled"): "quality 5", ("one", "teacher"): "quality 9",
    ("two", "base"): "quality 4", ("two", "distilled"): "quality 4", ("two", "teacher"): "quality 3",
}  # fmt: skip


def sit(folder: ComparisonFolder, teacher: Panellist, **values: object) -> Judged:
    config = JudgeConfig.model_validate({"comparison": folder.root, "pairwise": True, **values})
    return judge_all(config, [judge_of(teacher)])


def said(duels: list[Duel]) -> dict[tuple[str, str, str], str | None]:
    return {(row.prompt_id, row.first, row.second): row.winner for row in duels}


def pair_questions(teacher: Panellist) -> list[str]:
    return [question for question in teacher.questions if "[answer A " in question]


def test_each_pair_is_judged_in_both_orders_and_kept_as_rows(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c", ANSWERS)
    teacher = Panellist()
    duels = sit(folder, teacher).duels[teacher.spec]
    assert said(duels) == {
        ("one", "distilled", "base"): "first", ("one", "base", "distilled"): "second",
        ("one", "distilled", "teacher"): "second", ("one", "teacher", "distilled"): "first",
        ("two", "distilled", "base"): "tie", ("two", "base", "distilled"): "tie",
        ("two", "distilled", "teacher"): "first", ("two", "teacher", "distilled"): "second",
    }  # fmt: skip
    assert sorted(read_rows(folder.duels, Duel), key=repr) == sorted(duels, key=repr)
    # Three pairs of different answers, twice each; that of the same answers was not asked about.
    assert len(pair_questions(teacher)) == 6
    shas = {row.first_sha256 for row in duels if row.first == "teacher" and row.prompt_id == "one"}
    assert shas == {generation("one", "teacher", "quality 9").answer_sha256}
    again = Panellist(answer=lambda _: pytest.fail("asked"))
    assert sit(folder, again).duels[teacher.spec] == duels


def test_the_same_answer_is_a_tie_and_nobody_is_asked(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c", {("one", "base"): "same 1", ("one", "distilled"): "same 1"})
    teacher = Panellist(answer=lambda request: choice("A") if "answer A" in question_of(request) else scores(1))
    duels = sit(folder, teacher).duels[teacher.spec]
    assert [row.winner for row in duels] == ["tie", "tie"]
    assert pair_questions(teacher) == []


def test_only_what_changed_is_compared_again(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c", ANSWERS)
    sit(folder, Panellist())
    append_row(folder.generations, generation("two", "base", "quality 8"))
    second = Panellist()
    duels = said(sit(folder, second).duels[second.spec])
    assert duels["two", "distilled", "base"] == "second"
    assert len(pair_questions(second)) == 2
    assert len(duels) == 8


def test_an_unreadable_choice_is_missing_and_never_a_tie(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c", {("one", "base"): "quality 2", ("one", "distilled"): "quality 5"})

    def answer(request: Request) -> str:
        if "[answer A " not in question_of(request):
            return by_quality(request)
        return choice("neither") if "quality 2" in answers_in(question_of(request))[0] else choice("A")

    teacher = Panellist(answer=answer)
    duels = sit(folder, teacher).duels[teacher.spec]
    assert said(duels) == {("one", "distilled", "base"): "first", ("one", "base", "distilled"): None}
    assert next(row for row in duels if row.winner is None).problem
    assert len(pair_questions(teacher)) == 4  # One was read, the other asked for three times.
    (found,) = settled(duels, "distilled", "base")
    assert (found.winner, found.contradicted) == (None, False)
    readable = Panellist()
    assert None not in said(sit(folder, readable).duels[teacher.spec]).values()
    assert len(readable.asked) == 1


@pytest.mark.parametrize(
    "reply",
    [
        "A", "", '{"winner": "A"}', '{"rationale": "", "winner": "A"}', '{"rationale": "x", "winner": "a"}',
        '{"rationale": "x", "winner": "TIE"}', '{"rationale": "x", "winner": "C"}',
        '{"rationale": "x", "winner": null}', '{"rationale": "x", "winner": ["A"]}',
        '{"rationale": "x", "winner": "A", "winner": "B"}',
        '{"rationale": "x", "winner": "A", "score": 3}', '[{"rationale": "x", "winner": "A"}]', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_choice_is_read_strictly(tmp_path: Path, reply: str) -> None:
    folder = comparison(tmp_path / "c", {("one", "base"): "quality 2", ("one", "distilled"): "quality 5"})
    duels = sit(folder, Panellist(answer=lambda _: reply)).duels["scripted:judge"]
    assert [(row.winner, bool(row.problem)) for row in duels] == [(None, True)] * 2


def test_a_refused_choice_is_missing(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c", {("one", "base"): "quality 2", ("one", "distilled"): "quality 5"})
    teacher = Panellist(answer=lambda _: refusal())
    assert [row.winner for row in sit(folder, teacher).duels[teacher.spec]] == [None, None]
    assert len(teacher.asked) == 4


def test_who_comes_first_is_drawn_by_the_texts_alone() -> None:
    def first_texts(one: str, other: str) -> list[str]:
        rows = [generation(f"p{n}", who, f"{n} by {who == one}") for n in range(200) for who in (one, other)]
        return [pair.first.text for pair in itertools.islice(drawn(rows, ()), 0, None, 2)]

    texts = first_texts("distilled", "base")
    assert texts == first_texts("base", "distilled") == first_texts("mine", "base")
    # Neither place is one contender's: 200 fair draws are within 70 and 130 but for one time in 50,000.
    assert 70 < sum(text.endswith("True") for text in texts) < 130


def test_both_orders_quote_the_same_two_answers_and_say_which_is_which() -> None:
    rows = [generation("one", "base", "quality 2"), generation("one", "distilled", "quality 5")]
    first, second = (question_of(judge_of(Panellist()).pair_request(pair)) for pair in drawn(rows, ()))
    assert answers_in(first) == answers_in(second)[::-1]
    assert first.index("[answer A ") < first.index("[answer B ")
    assert first.index('"rationale"') < first.index('"winner"')


@given(st.permutations(["teacher", "base", "distilled", "small", "old"]))
def test_who_is_held_against_whom(order: list[str]) -> None:
    found = pairs_of(order)
    others = [("small", "base"), ("old", "base")]
    assert found[:2] == [("distilled", "base"), ("distilled", "teacher")]
    assert sorted(found[2:]) == sorted(others)
    assert pairs_of([name for name in order if name != "base"]) == [("distilled", "teacher")]
    assert pairs_of(["teacher", "base"]) == []


WINNERS = ("first", "second", "tie", None)


@given(st.lists(st.tuples(st.sampled_from(WINNERS), st.sampled_from(WINNERS)), max_size=8), st.booleans())
def test_both_orders_are_taken_together(said_of: list[tuple[str | None, str | None]], turned: bool) -> None:
    """Seen from either contender, a win is the other's loss, and only what both orders say is one."""
    rows: list[Duel] = []
    for number, winners in enumerate(said_of):
        one, other = generation(f"p{number}", "distilled", "a"), generation(f"p{number}", "base", "b")
        rows += [
            duel(pair, "j", winner)  # type: ignore[arg-type]
            for pair, winner in zip((Pair(one, other), Pair(other, one)), winners, strict=True)
        ]
    ours = settled(rows[::-1] if turned else rows, "distilled", "base")
    theirs = {found.prompt_id: found for found in settled(rows, "base", "distilled")}
    mirror = {"first": "second", "second": "first", "tie": "tie", None: None}
    assert len(ours) == len(theirs) == len(said_of)
    for found in ours:
        first, swapped = said_of[int(found.prompt_id[1:])]
        if None in (first, swapped):
            assert found.winner is None
        elif first == mirror[swapped]:
            assert found.winner == first
        else:
            assert found.winner == "tie"
        assert found.contradicted is ({first, mirror[swapped]} == {"first", "second"})
        assert theirs[found.prompt_id].winner == mirror[found.winner]


@pytest.mark.parametrize("winner", ["first", "tie"])
def test_one_order_alone_says_nothing(winner: Any) -> None:
    one, other = generation("p", "distilled", "a"), generation("p", "base", "b")
    (found,) = settled([duel(Pair(one, other), "j", winner)], "distilled", "base")
    assert (found.winner, found.contradicted) == (None, False)


def test_duels_on_earlier_answers_do_not_count(tmp_path: Path) -> None:
    one, other = generation("p", "distilled", "a"), generation("p", "base", "b")
    rows = [
        duel(Pair(one, other), "j", "first"),
        duel(Pair(one, other), "j", "tie"),
        duel(Pair(other, one), "j", "tie"),
    ]
    answers = {("p", "distilled"): one, ("p", "base"): other}
    assert list(fitting_duels(rows, answers)[0]) == rows[1:]
    assert list(fitting_duels(rows, {**answers, ("p", "base"): generation("p", "base", "new")})[0]) == []
    assert list(fitting_duels(rows, {("p", "base"): other})[0]) == []


def test_no_pair_is_one_clear_error_before_anything_is_asked(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c", {("one", "base"): "1", ("one", "teacher"): "2"})
    teacher = Panellist()
    with pytest.raises(ConfigError, match="base, teacher"):
        sit(folder, teacher)
    assert (teacher.asked, teacher.closed) == ([], True)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["judge", *arguments])
    return result.exit_code, result.stdout


def test_the_rubric_compares_by_its_scores(tmp_path: Path) -> None:
    good = "Use it so:\n\n```python\ndef one(x: int) -> int:\n    return x\n\nassert one(1) == 1\n```\n"
    folder = comparison(
        tmp_path / "c",
        {("one", "base"): "", ("one", "distilled"): good, ("two", "base"): good, ("two", "distilled"): good},
    )
    code, output = run(str(folder.root), "--pairwise", "--json")
    assert code == 0
    (pair,) = json.loads(output)["pairs"]
    assert (pair["won"], pair["lost"], pair["tied"], pair["contradicted"], pair["missing"]) == (1, 0, 1, 0, 0)
    assert "distilled against base: won 1, lost 0, tied 1." in run(str(folder.root), "--pairwise")[1]
    # Nothing is added by a second call.
    assert len(read_rows(folder.duels, Duel)) == 4
