"""The step as a whole: what it writes, and what it does when something is missing."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mlx_distill.cli.report import command
from mlx_distill.config import ReportConfig
from mlx_distill.errors import FolderError, InputError
from mlx_distill.layout import append_row, lock
from mlx_distill.records import Verdict
from mlx_distill.report.run import CHARTS, report

#: Those of a comparison without tests.
ALWAYS = set(CHARTS) - {"objective"}


def test_all_files_are_written(project):
    root = project().write()
    files = report(ReportConfig(comparison=root))
    names = {path.name for path in root.iterdir()} - {".lock"}
    assert names == {
        "comparison.json", "generations.jsonl", "verdicts.jsonl",
        "report.html", "results.md", "pipeline.mmd", *(f"{name}.png" for name in ALWAYS),
    }  # fmt: skip
    assert files.headline == "Distillation took the student from 3.5 to 5.5 out of 10; its teacher scores 8.4."
    assert files.missing == ()
    assert files.unfinished == {"base": 0, "distilled": 0, "teacher": 0}

    before = {path.name: path.read_bytes() for path in root.iterdir()}
    report(ReportConfig(comparison=root))
    assert {path.name: path.read_bytes() for path in root.iterdir()} == before, "the same input, other bytes"


def test_without_answers_the_next_command_is_named(tmp_path):
    with pytest.raises(InputError) as caught:
        report(ReportConfig(comparison=tmp_path / "visuals" / "demo"))
    assert "mlx-distill compare adapters/demo" in str(caught.value)
    assert not (tmp_path / "visuals").exists()


def test_a_malformed_row_is_named_by_file_and_line(project):
    root = project().write()
    with (root / "verdicts.jsonl").open("a") as file:
        file.write('{"judge": 1}\n')
    with pytest.raises(InputError, match=r"verdicts\.jsonl:7"):
        report(ReportConfig(comparison=root))


def test_a_folder_in_use_is_left_alone(project):
    root = project().write()
    with lock(root), pytest.raises(FolderError):
        report(ReportConfig(comparison=root))
    assert not (root / "report.html").exists()


@pytest.mark.parametrize(
    ("choices", "said", "charts"),
    [
        ({"judges": ()}, "No answer has been judged yet", {"training_curves", "cost_scaling"}),
        ({"contenders": ("base", "distilled")}, "No teacher was asked", ALWAYS),
        ({"contenders": ("base",)}, "No answers of the distilled student", ALWAYS),
        ({"splits": ("train", "valid")}, "no test split", ALWAYS),
        ({"splits": ("train",)}, "no validation split", ALWAYS),
        ({"with_manifest": False}, "no manifest", ALWAYS),
        ({"with_run": False}, "training run was not found", {"model_scorecard", "prompt_comparison", "cost_scaling"}),
        ({"with_metrics": False}, "no metrics", {"model_scorecard", "prompt_comparison", "cost_scaling"}),
        ({"answers": {("task-1", "distilled"): None}}, "1 prompt without an answer of distilled", ALWAYS),
    ],
)
def test_a_missing_piece_is_said_and_the_rest_is_shown(project, read, choices, said, charts):
    told = read(project(**choices))
    assert any(said in text for text in told.missing)
    assert said in told.page
    assert said in told.results
    assert told.charts == charts


def test_without_scores_the_headline_is_the_training_s(project):
    files = report(ReportConfig(comparison=project(judges=()).write()))
    assert files.headline == "Validation loss fell from 1.600 to 1.300; the answers have not been judged yet."


def test_a_comparison_without_its_record_finds_the_run_of_its_name(project, read):
    told = read(project(with_record=False))
    assert "training_curves" in told.charts
    assert told.missing == ()


def test_a_chart_that_can_no_longer_be_drawn_is_removed(project):
    root = project().write()
    report(ReportConfig(comparison=root))
    (root / "verdicts.jsonl").unlink()
    files = report(ReportConfig(comparison=root))
    assert not (root / "model_scorecard.png").exists()
    assert "model_scorecard" not in files.charts


def test_empty_answers_are_shown_as_empty(project, read):
    made = project(answers={(f"task-{n}", c): "" for n in range(2) for c in ("base", "distilled", "teacher")})
    assert read(made).page.count("The answer is empty.") == 6


def test_two_judges_stand_side_by_side_and_the_headline_names_its_own(project):
    made = project(judges=("rubric", "anthropic:claude-opus-4-6"), teacher="anthropic:claude-sonnet-4-6")
    files = report(ReportConfig(comparison=made.write()))
    assert list(files.scores) == ["anthropic:claude-opus-4-6", "rubric"]
    assert files.headline.endswith("(judge: claude-opus-4-6).")
    for path in (files.page, files.results):
        text = path.read_text().replace("&#39;", "'")
        assert "claude-opus-4-6 (a model's opinion, of the teacher's own family)" in text
        assert "rubric (a rubric, not a model's opinion)" in text


def test_a_verdict_on_an_earlier_answer_is_never_shown(project):
    made = project()
    root = made.write()
    stale = made.verdicts()[0].model_copy(update={"answer_sha256": "0" * 64, "judge": "anthropic:ghost"})
    append_row(root / "verdicts.jsonl", stale)
    files = report(ReportConfig(comparison=root))
    assert set(files.scores) == {"rubric"}
    assert "1 verdict left out" in files.results.read_text()
    assert "ghost" not in files.page.read_text()


def test_a_verdict_made_again_replaces_the_outdated_one(project):
    made = project()
    root = made.write()
    text = (root / "verdicts.jsonl").read_text()
    outdated = "".join(
        v.model_copy(update={"answer_sha256": "0" * 64, "scores": {}}).to_json() + "\n" for v in made.verdicts()
    )
    (root / "verdicts.jsonl").write_text(outdated + text)
    files = report(ReportConfig(comparison=root))
    assert files.scores["rubric"]["base"] == pytest.approx(3.45)
    assert "left out" not in files.results.read_text()


def test_an_unreadable_verdict_is_missing_and_never_zero(project):
    made = project(judges=())
    root = made.write()
    for verdict in project(judges=("rubric",)).verdicts():
        unread = verdict.prompt_id == "task-1" and verdict.contender == "distilled"
        row = Verdict(**(verdict.model_dump() | ({"scores": {}, "problem": "not JSON"} if unread else {})))
        append_row(root / "verdicts.jsonl", row)
    files = report(ReportConfig(comparison=root))
    assert files.scores["rubric"]["distilled"] == pytest.approx(5.2)
    assert "1 verdict of rubric could not be read" in files.results.read_text()
    assert "not JSON" in files.page.read_text()


def test_the_command_prints_one_json_object(project):
    root = project(cut={("task-0", "base")}).write()
    result = CliRunner().invoke(command, [str(root), "--json"])
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert data["report"] == str(root / "report.html")
    assert data["unfinished"] == {"base": 1, "distilled": 0, "teacher": 0}
    assert data["scores"]["rubric"]["base"] == pytest.approx(3.45)


def test_the_command_fails_in_one_message(tmp_path):
    result = CliRunner().invoke(command, [str(tmp_path)])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert "Traceback" not in result.stderr
