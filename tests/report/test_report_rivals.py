"""Several runs against each other: other students on the prompts that both asked, by the same tests and judges."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_distill.cli.report import command
from mlx_distill.config import ReportConfig
from mlx_distill.errors import InputError
from mlx_distill.report.analysis import analyse
from mlx_distill.report.evidence import read_evidence
from mlx_distill.report.page import page
from mlx_distill.report.rivals import with_rivals
from mlx_distill.report.run import inputs, report
from mlx_distill.report.tables import results
from mlx_distill.stats import bootstrap_interval
from tests.report.conftest import Project


def always(_number, _sample):
    return True


@pytest.fixture
def pair(tmp_path):
    """Writes two comparisons; the choices are the second's."""

    def make(**choices: object) -> tuple[Project, Project, Path, Path]:
        first = Project(tmp_path / "one", prompts=12, tested=12)
        second = Project(tmp_path / "two", **{"prompts": 9, "tested": 9, **choices})  # type: ignore[arg-type]
        roots = first.write(), second.write()
        return first, second, *roots

    return make


def test_the_other_student_stands_on_the_shared_prompts(pair):
    scores = {"base": 3.0, "distilled": 6.5, "teacher": 8.0}
    _, _, root, other = pair(scores=scores, passes={"base": always, "distilled": always, "teacher": always})
    found = analyse(with_rivals(read_evidence(root), [other]))
    # Both comparisons are called demo.
    assert found.evidence.contenders == ("base", "distilled", "teacher", "demo")
    assert len(found.evidence.of("demo")) == 9
    assert found.objective.contenders["demo"].pass_1.value == 1.0
    (versus,) = found.rivals
    assert versus.rival.shared == 9
    # The student fails 1, 4 and 7 of these nine.
    assert versus.passes.value == pytest.approx(3 / 9)
    differences = [float(n % 3 == 1) for n in range(9)]
    assert versus.passes.interval == bootstrap_interval(differences, groups=[f"family-{n % 6}" for n in range(9)])
    assert versus.scores["rubric"].value == pytest.approx(1.5)
    for text in (page(found), results(found)):
        assert "demo − distilled, pass@1, points" in text
        assert "+33.3" in text
        assert "asked 9 of these 12 prompts" in text
    # What was said of the student before is not moved by who stands beside it.
    alone = analyse(read_evidence(root))
    assert found.objective.change == alone.objective.change
    assert found.cards[0].change == alone.cards[0].change


def test_each_has_a_name_of_its_own_and_never_one_of_the_three(pair):
    _, _, root, other = pair()
    for folder, name in ((root, "x"), (other, "base")):
        record = folder / "comparison.json"
        record.write_text(record.read_text().replace('"name":"demo"', f'"name":"{name}"'))
    evidence = with_rivals(read_evidence(root), [other, other])
    assert evidence.contenders == ("base", "distilled", "teacher", "base-2", "base-3")


def test_what_differs_is_said(pair):
    _, _, root, other = pair()
    path = other / "comparison.json"
    path.write_text(path.read_text().replace('"max_tokens":64', '"max_tokens":128'))
    for name in ("generations.jsonl",):
        text = (other / name).read_text()
        (other / name).write_text(text.replace('"model":"base-model"', '"model":"another"'))
    found = analyse(with_rivals(read_evidence(root), [other]))
    said = " ".join(note.text for note in found.cautions)
    assert "demo: its base is another, not base-model" in said
    assert "demo: answered with token budget 128, not 64." in said


def test_an_answer_tested_by_other_tests_is_not_counted_beside_ours(pair):
    _, second, root, other = pair()
    rows = [row.model_copy(update={"task_sha256": "e" * 64}) for row in second.outcomes()]
    second.folder.outcomes.write_text("".join(row.to_json() + "\n" for row in rows))
    record = other / "comparison.json"
    text = record.read_text()
    record.write_text(text[: text.index('"tasks_sha256"')] + text[text.index('"samples"') :])
    found = analyse(with_rivals(read_evidence(root), [other]))
    assert "demo" not in found.objective.contenders
    assert found.rivals[0].passes is None


def test_another_question_of_the_same_id_is_not_shared(pair):
    _, _, root, other = pair()
    path = other / "generations.jsonl"
    path.write_text(path.read_text().replace("number 0.", "number zero."))
    assert with_rivals(read_evidence(root), [other]).rivals[0].shared == 8
    path.write_text(path.read_text().replace("Write `double`", "Explain `double`"))
    with pytest.raises(InputError, match="none of the prompts"):
        with_rivals(read_evidence(root), [other])


def test_a_comparison_without_a_student_is_refused(pair):
    _, _, root, other = pair(contenders=("base", "teacher"))
    with pytest.raises(InputError, match="no answers of a distilled student"):
        report(ReportConfig(comparison=root, against=str(other)))


def test_the_step_reads_what_it_is_set_against(pair):
    _, _, root, other = pair()
    config = ReportConfig(comparison=root, against=f"{other}, {other}", only="md")
    assert config.others == (other,)
    assert other / "generations.jsonl" in inputs(config)
    assert all(path.exists() for path in inputs(config))
    files = report(config)
    assert f"--against {other}" in files.results.read_text()


def test_only_what_is_asked_for_is_written(project):
    root = project(prompts=6, tested=6).write()
    result = CliRunner().invoke(command, [str(root), "--only", "md", "--json"])
    assert result.exit_code == 0, result.output
    assert {path.name for path in root.iterdir()} >= {"results.md", "pipeline.mmd"}
    assert not list(root.glob("*.png"))
    assert not (root / "report.html").exists()
    before = (root / "results.md").read_bytes()
    files = report(ReportConfig(comparison=root, only="png,html"))
    assert (files.results, files.pipeline) == (None, None)
    assert files.charts.keys() >= {"objective", "model_scorecard"}
    assert files.page == root / "report.html"
    assert (root / "results.md").read_bytes() == before
    assert files.passes == pytest.approx({"base": 2 / 6, "distilled": 4 / 6, "teacher": 1.0})


@pytest.mark.parametrize("only", ["pdf", "png,", "", "png md"])
def test_an_unknown_kind_is_a_usage_error(project, only):
    result = CliRunner().invoke(command, [str(project().write()), "--only", only])
    assert result.exit_code == 2
    assert "--only" in result.stderr
