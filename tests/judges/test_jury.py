"""Several judges on one comparison: one file, each one's means and gap, how far they agree, and who is kin."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_distill.cli.judge import summarise
from mlx_distill.cli.main import main
from mlx_distill.config import JudgeConfig
from mlx_distill.errors import ConfigError, TeacherUnavailableError
from mlx_distill.judges.base import DIMENSIONS
from mlx_distill.judges.jury import gap, jury_agreement
from mlx_distill.judges.llm import LlmJudge
from mlx_distill.judges.rubric import RubricJudge
from mlx_distill.judges.run import Judged, judge_all, judges_from_spec
from mlx_distill.layout import ComparisonFolder, read_rows
from mlx_distill.records import Contender, DimensionScore, Request, Verdict
from tests.judges.judging import Panellist, comparison, generation, judge_of, scores
from tests.servers.chat_server import MODEL as CHAT_MODEL
from tests.servers.chat_server import Answer, ChatServer, completion

ANSWERS = {(p, who): f"{who} {n}" for n, p in enumerate(("one", "two")) for who in ("teacher", "base", "distilled")}


@pytest.fixture
def folder(tmp_path: Path) -> ComparisonFolder:
    return comparison(tmp_path / "c", ANSWERS)


def verdict(prompt: str, contender: Contender, score: float | None, judge: str = "j") -> Verdict:
    given = {} if score is None else dict.fromkeys(DIMENSIONS, DimensionScore(score=score, rationale="r"))
    return Verdict(prompt_id=prompt, contender=contender, judge=judge, answer_sha256="0", scores=given)


def test_all_verdicts_stand_in_one_file(folder: ComparisonFolder) -> None:
    one, two = Panellist(spec="scripted:one"), Panellist(answer=lambda _: scores(3), spec="scripted:two")
    judged = judge_all(JudgeConfig(comparison=folder.root), [judge_of(one), judge_of(two)])
    assert list(judged.verdicts) == ["scripted:one", "scripted:two"]
    assert {v.overall for v in judged.verdicts["scripted:two"]} == {3}
    rows = read_rows(folder.verdicts, Verdict)
    assert sorted(map(repr, rows)) == sorted(repr(v) for found in judged.verdicts.values() for v in found)
    assert one.closed
    assert two.closed


def test_a_judge_that_fails_leaves_what_those_before_it_said(folder: ComparisonFolder) -> None:
    def fail(_: Request) -> str:
        raise TeacherUnavailableError("no key.")

    one, two = Panellist(spec="scripted:one"), Panellist(answer=fail, spec="scripted:two")
    with pytest.raises(TeacherUnavailableError):
        judge_all(JudgeConfig(comparison=folder.root), [judge_of(one), judge_of(two)])
    assert sum(v.judge == "scripted:one" and bool(v.scores) for v in read_rows(folder.verdicts, Verdict)) == 6
    assert one.closed
    assert two.closed


def test_the_gap_is_over_prompts_that_both_were_scored_on() -> None:
    rows = [
        verdict("a", "base", 2), verdict("a", "distilled", 5),
        verdict("b", "base", 4), verdict("b", "distilled", 3),
        verdict("c", "base", 0), verdict("c", "distilled", None),
        verdict("d", "distilled", 10), verdict("d", "teacher", 10),
    ]  # fmt: skip
    found = gap(rows)
    assert found is not None
    assert (found.mean, found.prompts) == (1.0, 2)
    assert gap(rows[4:]) is None


def test_agreement_is_over_answers_that_two_judges_scored() -> None:
    def rows(*values: float | None) -> list[Verdict]:
        return [verdict(f"p{n}", "base", value) for n, value in enumerate(values)]

    assert jury_agreement({"one": rows(1, 2)}) is None
    full = jury_agreement({"one": rows(1, 2, 3, None, 9), "two": rows(1, 2, 3, 4, None)})
    assert full is not None
    assert (full.alpha, full.answers) == (1.0, 3)
    # Of two raters, by hand: values 0, 10, 10, 0 in two units; D_o = 100, D_e = 200 / 3.
    opposed = jury_agreement({"one": rows(0, 10), "two": rows(10, 0)})
    assert opposed is not None
    assert opposed.alpha == pytest.approx(1 - 100 / (200 / 3))
    assert jury_agreement({"one": rows(5, 5), "two": rows(5, 5)}).alpha is None  # type: ignore[union-attr]
    apart = jury_agreement({"one": rows(1, None), "two": rows(None, 1)})
    assert apart is not None
    assert (apart.alpha, apart.answers) == (None, 0)


def test_judges_are_named_with_commas(tmp_path: Path) -> None:
    recorded = tmp_path / "answers.jsonl"
    recorded.write_text('{"prompt": "a", "answer": "b"}\n')
    config = JudgeConfig(comparison=tmp_path, judge=f"rubric, recorded:{recorded},rubric")
    assert config.judges == ("rubric", f"recorded:{recorded}")
    rubric, model = judges_from_spec(config)
    assert isinstance(rubric, RubricJudge)
    assert isinstance(model, LlmJudge)
    for wrong in ("", ",", "rubric,", "rubric,,rubric", "rubric,recorded:", "rubric,rubrik"):
        with pytest.raises(ConfigError):
            judges_from_spec(JudgeConfig(comparison=tmp_path, judge=wrong))


def test_a_base_url_needs_a_judge_that_takes_one(tmp_path: Path) -> None:
    config = JudgeConfig(comparison=tmp_path, judge="rubric", base_url="http://127.0.0.1:1/v1")
    with pytest.raises(ConfigError, match="base URL"):
        judges_from_spec(config)


def test_a_jury_of_the_rubric_and_a_served_model(folder: ComparisonFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ChatServer() as server:
        server.answers.extend(Answer(200, completion(scores(value))) for value in (9, 1, 5, 9, 1, 5))
        arguments = ["judge", str(folder.root), "--judge", f"openai:{CHAT_MODEL},rubric", "--base-url", server.url]
        result = CliRunner().invoke(main, [*arguments, "--concurrency", "1"])
        assert result.exit_code == 0, result.output
        again = CliRunner().invoke(main, [*arguments, "--json"])
        assert len(server.requests) == 6
    table = result.stdout.split("Overall by judge", 1)[1].splitlines()
    assert table[0].split() == ["teacher", "base", "distilled", "distilled", "-", "base"]
    assert table[1].split() == [f"openai:{CHAT_MODEL}", "9.00", "1.00", "5.00", "+4.00", "(2", "prompts)"]
    assert "Krippendorff's alpha" in result.stdout
    found = json.loads(again.stdout)
    assert [entry["judge"] for entry in found["judges"]] == [f"openai:{CHAT_MODEL}", "rubric"]
    assert found["judges"][0]["gap"] == {"mean": 4.0, "prompts": 2}
    assert found["agreement"]["answers"] == 6


def test_a_judge_of_the_teachers_family_is_labelled_wherever_its_scores_stand(folder: ComparisonFolder) -> None:
    generations = [generation("one", "teacher", "x", model="anthropic:claude-sonnet-4-6")]
    kin, other = "anthropic:claude-opus-4-6", "openai:gpt-5.2"
    rows = {name: [verdict("one", "base", 5, name), verdict("one", "distilled", 6, name)] for name in (kin, other)}
    found = summarise(Judged(rows, {}, {}), generations, JudgeConfig(comparison=folder.root))
    assert not callable(found.lines)
    for line in found.lines:
        if kin in line:
            assert "family" in line
        if other in line:
            assert "family" not in line
    assert sum(kin in line for line in found.lines) == 2
    assert [entry["same_family"] for entry in found.data["judges"]] == [True, False]


def test_one_judge_without_a_readable_verdict_fails_the_command(folder: ComparisonFolder, tmp_path: Path) -> None:
    recorded = tmp_path / "judge.jsonl"
    recorded.write_text('{"prompt": "something else", "answer": "b"}\n')
    result = CliRunner().invoke(main, ["judge", str(folder.root), "--judge", f"rubric,recorded:{recorded}"])
    assert result.exit_code == 1
    assert "6 of 6 verdicts are missing" in result.stdout
    assert "Overall" in result.stdout
