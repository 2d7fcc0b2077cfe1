"""The divergence from the teacher in the report: on held-out answers, and as training minimised it; never confused."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from matplotlib.image import imread

from mlx_distill.config import ReportConfig
from mlx_distill.layout import write_text
from mlx_distill.report.analysis import analyse
from mlx_distill.report.curves import curves, points_table
from mlx_distill.report.evidence import read_evidence
from mlx_distill.report.figures import tables_of_losses
from mlx_distill.report.findings import minimised_finding
from mlx_distill.report.page import facts
from mlx_distill.report.run import report
from mlx_distill.report.training import course_of
from mlx_distill.run_records import MetricRow
from mlx_distill.scores import HeldOutLoss
from mlx_distill.stats import bootstrap_interval
from tests.report.conftest import Project

NLL = {"base": [20.0, 30.0, 75.0, 44.0, 90.0, 61.0], "distilled": [15.0, 25.0, 60.0, 41.0, 70.0, 60.0]}
APART = {"base": [9.0, 14.0, 31.0, 20.0, 44.0, 30.0], "distilled": [4.0, 9.0, 12.0, 11.0, 20.0, 9.0]}
TOKENS = (10, 20, 30, 40, 50, 60)
TITLE = "Divergence from the teacher on its held-out answers"


def analysis_of(made: Project):
    return analyse(read_evidence(made.write()))


def distances(made: Project):
    return analysis_of(made).losses.distances


def test_it_is_nats_a_token_with_its_change(project):
    found = distances(project(held_out=NLL, apart=APART))
    assert (found.teacher, found.top_k, found.rows, found.tokens) == ("big@0123456789ab", 64, 6, sum(TOKENS))
    assert found.contenders == pytest.approx({c: sum(values) / sum(TOKENS) for c, values in APART.items()})
    change = found.changes["distilled"]
    assert change.value == pytest.approx((sum(APART["distilled"]) - sum(APART["base"])) / sum(TOKENS))
    # As of the perplexity: the tokens of an answer are drawn together.
    shares = [(d - b) / t for b, d, t in zip(APART["base"], APART["distilled"], TOKENS, strict=True)]
    spread = [share for share, t in zip(shares, TOKENS, strict=True) for _ in range(t)]
    rows = [row for row, t in enumerate(TOKENS) for _ in range(t)]
    assert change.interval == bootstrap_interval(spread, groups=rows)


def test_page_tables_and_fact_say_it(project, read):
    made = project(held_out=NLL, apart=APART)
    told = read(made)
    found = analyse(read_evidence(made.folder.root))
    _, table = tables_of_losses(found)
    assert table.title == TITLE
    assert table.rows[0] == ("Base", "0.705", "–", "–", "–")
    assert table.rows[1][:3] == ("Distilled", "0.310", "−0.395")
    assert table.rows[1][4] == "better"
    plain = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", told.page)).replace("&#39;", "'")
    for row in table.rows:
        assert "| " + " | ".join(row) + " |" in told.results
        assert " ".join(row) in plain
    assert table.note in plain
    assert "0 is that teacher itself" in table.note and "its 64 likeliest words" in table.note
    assert "210 tokens of 6 answers" in table.note
    (fact,) = (f for f in facts(found.evidence, found.course, found.losses) if f.title == "Divergence from the teacher")
    assert (fact.before, fact.value) == ("0.705", "0.310")


def test_a_change_that_may_be_chance_is_not_claimed(project):
    apart = {"base": APART["base"], "distilled": [n + (2 if i % 2 else -2) for i, n in enumerate(APART["base"])]}
    _, table = tables_of_losses(analysis_of(project(held_out=NLL, apart=apart)))
    assert table.rows[1][-1] == "not distinguishable"


def test_of_few_answers_no_interval_is_told(project):
    short = {c: values[:4] for c, values in NLL.items()}
    _, table = tables_of_losses(analysis_of(project(held_out=short, apart=APART)))
    assert table.rows[1][3:] == ("–", "too few for an interval")


def test_without_it_the_report_is_silent(project, read):
    told = read(project(held_out=NLL))
    assert "ivergence" not in told.page and "ivergence" not in told.results


def test_a_student_at_its_teacher_is_at_nothing(project):
    """What rounding takes below it."""
    apart = {"base": [0.0] * 6, "distilled": [-1e-7] * 6}
    _, table = tables_of_losses(analysis_of(project(held_out=NLL, apart=apart)))
    assert [row[1] for row in table.rows] == ["0.000", "0.000"]


def test_only_rows_that_both_were_measured_on_count(project):
    made = project(held_out=NLL, apart=APART)
    root = made.write()
    rows = made.losses()
    rows[2] = rows[2].model_copy(update={"divergence": None})
    write_text(made.folder.held_out, "".join(row.to_json() + "\n" for row in rows))
    found = analyse(read_evidence(root)).losses
    assert (found.distances.rows, found.distances.tokens) == (5, 180)
    assert found.distances.contenders["base"] == pytest.approx((sum(APART["base"]) - 31) / 180)
    assert found.contenders["base"].rows == 6, "the perplexity is of all"


@pytest.mark.parametrize("change", [{"teacher": "other@1"}, {"top_k": 8}])
def test_different_measures_are_not_set_beside_each_other(project, change):
    made = project(held_out=NLL, apart=APART)
    root = made.write()
    rows = [row.model_copy(update=change) if row.contender == "base" else row for row in made.losses()]
    write_text(made.folder.held_out, "".join(row.to_json() + "\n" for row in rows))
    found = analyse(read_evidence(root))
    assert found.losses.distances.contenders.keys() == {"distilled"}
    assert found.losses.distances.changes == {}
    _, table = tables_of_losses(found)
    assert len(table.rows) == 1
    assert table.note.endswith("Measured against another teacher, and not shown: Base.")


def test_rows_of_before_are_read(project):
    made = project(held_out=NLL, apart=APART)
    root = made.write()
    old = [
        {k: v for k, v in row.model_dump().items() if k not in ("divergence", "teacher", "top_k")}
        for row in made.losses()
    ]
    write_text(made.folder.held_out, "".join(json.dumps(row) + "\n" for row in old))
    found = analyse(read_evidence(root)).losses
    assert found.contenders.keys() == {"base", "distilled"} and found.distances is None
    assert HeldOutLoss.model_validate(old[0]).to_json() == json.dumps(old[0], separators=(",", ":"))


def test_a_teachers_name_can_do_nothing(project, read):
    told = read(project(held_out=NLL, apart=APART, apart_from="<script>alert(1)</script>\x1b[31m|x@1"))
    assert "<script>alert" not in told.page and "\x1b" not in told.page + told.results
    assert "<script>alert" not in told.results


# As training minimised it


@pytest.mark.parametrize(
    ("minimised", "name"),
    [
        ("forward-kl", "forward KL divergence"),
        ("reverse-kl", "reverse KL divergence"),
        ("jsd", "generalised Jensen-Shannon divergence, beta 0.5"),
    ],
)
def test_the_training_section_says_what_was_minimised(project, read, minimised, name):
    told = read(project(minimised=minimised))
    sentence = f"Training minimised the {name} from big; on the validation rows it went 0.600 → 0.300 nats a token."
    assert sentence in told.page and sentence in told.results
    assert f"Divergence from the teacher, nats a token: {name}, as minimised" in told.page
    # Means over the tokens of the steps, as the loss beside it, less the one that the made-up rows lie below it.
    rows = [line.split(" | ") for line in told.results.splitlines() if line.startswith(("| before", "| 1 |", "| 2 |"))]
    assert [row[6] for row in rows] == ["0.600", "0.400", "0.300"]
    assert [row[5] for row in rows] == ["–", *(f"{float(row[1]) - 1:.3f}" for row in rows[1:])]
    assert "Test: loss 1.350, token accuracy 63.0 %, divergence 0.350." in told.results


def test_a_weight_and_a_temperature_are_told(project):
    made = project(minimised="jsd")
    root = made.write()
    record = made.run_record()
    config = {**record.config, "distill_temperature": 2.0, "distill_weight": 0.5, "distill_beta": 0.1}
    write_text(made.run.record, record.model_copy(update={"config": config}).to_json())
    found = course_of(read_evidence(root))
    assert found is not None and found.minimised is not None
    assert found.minimised.name == (
        "generalised Jensen-Shannon divergence, beta 0.1, at temperature 2.0, at a weight of 0.5 against the loss"
    )


def test_the_curve_has_the_points(project):
    found = course_of(read_evidence(project(minimised="reverse-kl").write()))
    titles = [title for title, _ in curves(found)]
    assert titles[:2] == ["Loss, nats a token", "Token accuracy"] and len(titles) == 3
    drawn = str(curves(found)[2][1])
    assert "training rows from 0.450 at step 1 to 0.100 at step 8" in drawn
    assert "validation rows from 0.600 at step 0 to 0.300 at step 8" in drawn
    table = points_table(found)
    assert table.head[-1] == "Divergence from the teacher"
    assert [row[-1] for row in table.rows] == ["0.600", "0.400", "0.300"]
    assert table.note == minimised_finding(found)


def test_text_alone_has_no_curve_of_it(project):
    found = course_of(read_evidence(project().write()))
    assert found.minimised is None and minimised_finding(found) is None
    assert len(curves(found)) == 2
    assert points_table(found).head[-1] == "Token accuracy"


def test_what_the_student_wrote_is_no_training_row(project):
    made = project(minimised="reverse-kl")
    root = made.write()

    def rewrite(own):
        rows = [
            row.model_copy(update={"on_policy": True, "divergence": 9.0, "loss": 0.01})
            if row.kind == "step" and own(row.step)
            else row
            for row in made.metrics()
        ]
        write_text(made.run.metrics, "".join(row.to_json() + "\n" for row in rows))
        return course_of(read_evidence(root))

    found = rewrite(lambda step: step % 2 == 0)
    kept = [row for row in made.metrics() if row.kind == "step" and row.step in (1, 3)]
    tokens = sum(row.target_tokens for row in kept)
    assert found.epochs[1].train_divergence == pytest.approx(sum(r.divergence * r.target_tokens for r in kept) / tokens)
    assert found.epochs[1].train_loss == pytest.approx(sum(r.loss * r.target_tokens for r in kept) / tokens)
    assert found.epochs[1].steps == 4
    assert [row.step for row in found.of_rows] == [1, 3, 5, 7]
    assert found.steps_title == "training rows"
    assert "Steps on answers that the student wrote are not among the training rows." in minimised_finding(found)
    found = rewrite(lambda step: True)
    assert len(found.of_rows) == 8 and found.epochs[1].train_divergence == 9.0
    assert found.steps_title == "the student's own answers"
    assert "the student&#39;s own answers from 9.000 at step 1" in str(curves(found)[2][1])


def test_the_course_of_a_run_without_validation(project, read):
    told = read(project(minimised="reverse-kl", splits=("train",)))
    assert "as minimised" in told.page
    # What the record says of its start and end stands.
    assert "0.600 → 0.300" in told.results


def test_the_picture_gains_a_panel(project):
    def height(made: Project) -> int:
        path = report(ReportConfig(comparison=made.write(), only="png")).charts["training_curves"]
        pixels = imread(path)[:, :, :3]
        inked = (pixels < 0.95).any(axis=2)
        edge = np.concatenate([inked[:6].ravel(), inked[-6:].ravel(), inked[:, :6].ravel(), inked[:, -6:].ravel()])
        assert pixels.shape[1] == 1800 and not edge.any()
        return int(pixels.shape[0])

    made = project(minimised="reverse-kl")
    with_it = height(made)
    without = [row.model_copy(update={"divergence": None}) for row in made.metrics()]
    write_text(made.run.metrics, "".join(row.to_json() + "\n" for row in without))
    assert all(row.divergence is None for row in read_evidence(made.folder.root).metrics)
    path = report(ReportConfig(comparison=made.folder.root, only="png")).charts["training_curves"]
    assert with_it > imread(path).shape[0] + 600


def test_metrics_may_lack_it_here_and_there(project):
    """As of a run that was begun before it was noted."""
    made = project(minimised="reverse-kl")
    root = made.write()
    rows: list[MetricRow] = [
        row.model_copy(update={"divergence": None}) if row.step < 4 else row for row in made.metrics()
    ]
    write_text(made.run.metrics, "".join(row.to_json() + "\n" for row in rows))
    found = course_of(read_evidence(root))
    assert found.epochs[0].valid_divergence is None
    assert "validation rows from 0.400 at step 4" in str(curves(found)[2][1])
    report(ReportConfig(comparison=root))
