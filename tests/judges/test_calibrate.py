"""Verdicts held against labels of people: exact numbers, nobody asked, and labels that are wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mlx_distill.calibration import Calibration, JudgeCalibration
from mlx_distill.cli.main import main
from mlx_distill.config import JudgeConfig
from mlx_distill.errors import FolderError, InputError
from mlx_distill.judges.base import DIMENSIONS, Pair
from mlx_distill.judges.calibrate import calibrate, read_labels, score_agreement
from mlx_distill.judges.duels import duel
from mlx_distill.layout import ComparisonFolder, append_row, lock, read_record
from mlx_distill.records import Contender, DimensionScore, Verdict
from tests.judges.judging import comparison, generation

ANSWERS = {(f"p{n}", who): f"{who} {n}" for n in range(4) for who in ("base", "distilled")}


def judged(folder: ComparisonFolder, scores: dict[tuple[str, Contender], float | None], judge: str = "j") -> None:
    for (prompt, contender), value in scores.items():
        one = generation(prompt, contender, ANSWERS[prompt, contender])
        given = {name: DimensionScore(score=value, rationale="r") for name in DIMENSIONS if value is not None}
        append_row(
            folder.verdicts,
            Verdict(prompt_id=prompt, contender=contender, judge=judge, answer_sha256=one.answer_sha256, scores=given),
        )


def labelled(folder: ComparisonFolder, rows: Iterable[Any]) -> JudgeConfig:
    path = folder.root.parent / "labels.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return JudgeConfig(comparison=folder.root, calibrate=path)


def label(prompt: str, contender: str, score: float, **more: Any) -> dict[str, Any]:
    return {"prompt_id": prompt, "contender": contender, "score": score, **more}


@pytest.fixture
def folder(tmp_path: Path) -> ComparisonFolder:
    """Four prompts that judge j scored the base's answers to with 1, 2, 3 and 4, and the student's with 5, 6, 7 and
    none."""
    made = comparison(tmp_path / "c", ANSWERS)
    judged(made, {(f"p{n}", "base"): n + 1.0 for n in range(4)})
    judged(made, {(f"p{n}", "distilled"): n + 5.0 if n < 3 else None for n in range(4)})
    return made


def only(found: Calibration) -> JudgeCalibration:
    (one,) = found.judges
    return one


def test_a_judge_that_is_one_point_milder(folder: ComparisonFolder) -> None:
    config = labelled(folder, [label(f"p{n}", "base", n) for n in range(4)])
    before = {path.name for path in folder.root.iterdir()}
    found = calibrate(config)
    row = only(found).overall
    assert (row.n, row.gap) == (4, 1.0)
    assert row.pearson == pytest.approx(1)
    assert row.spearman == pytest.approx(1)
    # Quadratic weights: Σ 1² over the four, against the mean of (i − j)² over all 16 pairs, 56 / 16.
    assert row.kappa == pytest.approx(1 - 1 / (56 / 16))
    assert only(found).pairs is None
    # Nobody was asked, and nothing else was written.
    assert {path.name for path in folder.root.iterdir()} - before == {"calibration.json", ".lock"}
    assert read_record(folder.calibration, Calibration) == found


def test_halves_are_rounded_up(folder: ComparisonFolder) -> None:
    """As a person would: 0.5 and 1.5 are 1 and 2, which is what the judge gave."""
    row = only(calibrate(labelled(folder, [label("p0", "base", 0.5), label("p1", "base", 1.5)]))).overall
    assert row.kappa == pytest.approx(1)


def test_labels_of_what_has_no_score_do_not_count(folder: ComparisonFolder) -> None:
    found = calibrate(labelled(folder, [label("p3", "distilled", 1), label("p0", "distilled", 3)]))
    row = only(found).overall
    assert (row.n, row.gap, row.pearson, row.spearman, row.kappa) == (1, 2.0, None, None, 0.0)


def test_scores_by_dimension_and_all_of_them_as_an_overall_one(folder: ComparisonFolder) -> None:
    every = dict.fromkeys(DIMENSIONS, 2)
    rows: list[dict[str, Any]] = [
        {"prompt_id": "p0", "contender": "base", "scores": {**every, "structure": 7}},
        {"prompt_id": "p1", "contender": "base", "scores": {"structure": 1.5}},
    ]
    one = only(calibrate(labelled(folder, rows)))
    assert one.overall.n == 1
    assert one.overall.gap == pytest.approx(1 - 3)
    assert list(one.dimensions) == list(DIMENSIONS)
    assert one.dimensions["structure"].n == 2
    assert one.dimensions["structure"].gap == pytest.approx((1 - 7 + 2 - 1.5) / 2)
    assert one.dimensions["correctness"].n == 1


def test_every_judge_is_told_apart_and_only_present_answers_count(folder: ComparisonFolder) -> None:
    judged(folder, {("p0", "base"): 9.0}, "k")
    append_row(folder.generations, generation("p1", "base", "a new answer"))
    found = calibrate(labelled(folder, [label("p0", "base", 1), label("p1", "base", 2), label("p1", "base", 4)]))
    assert [(one.judge, one.overall.n, one.overall.gap) for one in found.judges] == [("j", 1, 0.0), ("k", 1, 8.0)]


def test_several_labels_of_one_answer_count_each(folder: ComparisonFolder) -> None:
    row = only(calibrate(labelled(folder, [label("p0", "base", 1), label("p0", "base", 3)]))).overall
    assert (row.n, row.gap) == (2, -1.0)


def fight(folder: ComparisonFolder, prompt: str, forward: Any, backward: Any) -> None:
    one, other = (generation(prompt, who, ANSWERS[prompt, who]) for who in ("distilled", "base"))
    for pair, winner in ((Pair(one, other), forward), (Pair(other, one), backward)):
        append_row(folder.duels, duel(pair, "j", winner, problem=None if winner else "not JSON"))


def test_pairs_in_whichever_order_they_were_labelled(folder: ComparisonFolder) -> None:
    fight(folder, "p0", "first", "second")  # The student wins.
    fight(folder, "p1", "second", "first")  # The base wins.
    fight(folder, "p2", "first", "first")  # It went by the place: a tie.
    fight(folder, "p3", "first", None)  # Missing.
    rows = [
        {"prompt_id": "p0", "first": "distilled", "second": "base", "winner": "first"},
        {"prompt_id": "p0", "first": "base", "second": "distilled", "winner": "second"},
        {"prompt_id": "p1", "first": "distilled", "second": "base", "winner": "second"},
        {"prompt_id": "p2", "first": "distilled", "second": "base", "winner": "first"},
        {"prompt_id": "p3", "first": "distilled", "second": "base", "winner": "first"},
    ]
    pairs = only(calibrate(labelled(folder, rows))).pairs
    assert pairs is not None
    assert (pairs.n, pairs.agreement) == (4, 0.75)
    # By chance: first 1/4 · 2/4, second 2/4 · 2/4, tie 1/4 · 0.
    assert pairs.kappa == pytest.approx((0.75 - 0.375) / (1 - 0.375))


def test_unknown_prompts_and_contenders_are_counted_and_named(folder: ComparisonFolder) -> None:
    rows = [
        label("p0", "base", 1), label("nowhere", "base", 1), label("nowhere", "nobody", 1), label("p0", "nobody", 1),
        {"prompt_id": "p1", "first": "base", "second": "somebody", "winner": "tie"},
    ]  # fmt: skip
    config = labelled(folder, rows)
    found = calibrate(config)
    assert found.unknown_prompts == {"nowhere": 2}
    assert found.unknown_contenders == {"nobody": 1, "somebody": 1}
    assert only(found).overall.n == 1
    result = CliRunner().invoke(main, ["judge", str(folder.root), "--calibrate", str(config.calibrate)])
    assert result.exit_code == 0
    assert "2 are of unknown prompts: nowhere." in result.stdout
    assert "2 are of unknown contenders: nobody, somebody." in result.stdout


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([label("nowhere", "base", 1)], "unknown prompts: nowhere"),
        ([label("p0", "nobody", 1)], "unknown contenders: nobody"),
        ([label("p3", "distilled", 1)], "none of the 1 labels"),
        ([{"prompt_id": "p0", "first": "base", "second": "distilled", "winner": "tie"}], "none of the 1 labels"),
    ],
)
def test_labels_on_nothing_judged_are_one_clear_error(folder: ComparisonFolder, rows: list[Any], named: str) -> None:
    config = labelled(folder, rows)
    with pytest.raises(InputError, match=named) as raised:
        calibrate(config)
    assert raised.value.hint
    assert not folder.calibration.exists()
    result = CliRunner().invoke(main, ["judge", str(folder.root), "--calibrate", str(config.calibrate)])
    assert (result.exit_code, result.stdout) == (1, "")


def test_nothing_judged_yet_is_said(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c", ANSWERS)
    with pytest.raises(InputError, match="nothing is judged yet"):
        calibrate(labelled(folder, [label("p0", "base", 1)]))


DAMAGED = [
    "{", "[1]", "3", "null", '"x"', "{}", "not JSON", '{"prompt_id": "p0"}',
    '{"prompt_id": "p0", "contender": "base"}',
    '{"prompt_id": "p0", "contender": "base", "score": 11}',
    '{"prompt_id": "p0", "contender": "base", "score": -0.1}',
    '{"prompt_id": "p0", "contender": "base", "score": NaN}',
    '{"prompt_id": "p0", "contender": "base", "score": "7"}',
    '{"prompt_id": "p0", "contender": "base", "score": true}',
    '{"prompt_id": "p0", "contender": "base", "scores": {}}',
    '{"prompt_id": "p0", "contender": "base", "scores": {"style": 3}}',
    '{"prompt_id": "p0", "contender": "base", "scores": {"structure": 30}}',
    '{"prompt_id": "p0", "contender": "base", "score": 3, "note": "x"}',
    '{"prompt_id": "p0\\u001b[31m", "contender": "base", "score": 3}',
    '{"prompt_id": "p0", "contender": "the base", "score": 3}',
    '{"prompt_id": "p0", "first": "base", "second": "distilled"}',
    '{"prompt_id": "p0", "first": "base", "second": "distilled", "winner": "A"}',
    '{"prompt_id": "p0", "first": "base", "second": "base", "winner": "tie"}',
    '{"prompt_id": "p0", "first": "base", "winner": "tie"}',
    "[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("row", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_row_is_named_by_its_line(folder: ComparisonFolder, row: str) -> None:
    config = labelled(folder, [label("p0", "base", 1), "", row])
    with pytest.raises(InputError, match=r"labels\.jsonl:3: ") as raised:
        calibrate(config)
    assert raised.value.line == 3


def test_files_that_are_no_labels(folder: ComparisonFolder, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    (tmp_path / "binary.jsonl").write_bytes(bytes(range(256)))
    for path in (tmp_path / "nowhere", tmp_path / "empty.jsonl", tmp_path / "binary.jsonl", tmp_path):
        with pytest.raises(InputError):
            read_labels(path)
    (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(label("p0", "base", 1)).encode() + b"\r\n")
    assert len(read_labels(tmp_path / "windows.jsonl")) == 1


def test_a_folder_in_use_is_refused(folder: ComparisonFolder) -> None:
    config = labelled(folder, [label("p0", "base", 1)])
    with lock(folder.root), pytest.raises(FolderError):
        calibrate(config)


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), min_size=1, max_size=12))
def test_numbers_are_what_they_claim_or_none(rows: list[tuple[float, float]]) -> None:
    found = score_agreement(rows)
    turned = score_agreement([(theirs, ours) for ours, theirs in rows])
    assert found.n == len(rows)
    assert found.gap == pytest.approx(-(turned.gap or 0.0))
    for name in ("pearson", "spearman", "kappa"):
        value = getattr(found, name)
        assert value is None or -1 - 1e-9 <= value <= 1 + 1e-9
        assert (value is None) == (getattr(turned, name) is None)
    same = score_agreement([(ours, ours) for ours, _ in rows])
    assert same.gap == 0
    assert same.kappa in (None, pytest.approx(1))


def test_the_command_prints_a_table(folder: ComparisonFolder) -> None:
    fight(folder, "p0", "first", "second")
    rows = [label(f"p{n}", "base", n, scores={"structure": n}) for n in range(4)]
    rows.append({"prompt_id": "p0", "first": "distilled", "second": "base", "winner": "first"})
    config = labelled(folder, rows)
    arguments = ["judge", str(folder.root), "--calibrate", str(config.calibrate)]
    lines = CliRunner().invoke(main, arguments).stdout.splitlines()
    head = next(line for line in lines if "Pearson" in line)
    row = next(line for line in lines if line.startswith("j "))
    assert row.split() == ["j", "4", "1.00", "1.00", "0.71", "+1.00"]
    assert len(row) == len(head)
    assert next(line for line in lines if line.startswith("  structure")).split()[1] == "4"
    assert lines[lines.index(next(line for line in lines if line.startswith("Pairs"))) + 1].split() == [
        "j", "1", "1.00", "-",
    ]  # fmt: skip
    found = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert found["judges"][0]["overall"]["n"] == 4
