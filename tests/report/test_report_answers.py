"""Answers on the page: what changed line by line, how much is shown of long ones, and colours that stay apart."""

from __future__ import annotations

import re
from html import unescape
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread

from mlx_distill.config import ReportConfig
from mlx_distill.report.analysis import analyse
from mlx_distill.report.answers import FEWEST_CHARACTERS, _level, cases_of
from mlx_distill.report.diffs import MOST_LINES, diff
from mlx_distill.report.evidence import read_evidence
from mlx_distill.report.page import page
from mlx_distill.report.palette import CONTENDERS, DARK, LIGHT, OTHERS, ink, slot
from mlx_distill.report.run import report

LINE = re.compile(r"<(del|ins|span) class=\"([\w-]+)\">([−+⋯ ]) (.*)\n</\1>")

#: Machado, Oliveira and Fernandes (2009): linear RGB as it is seen without red, green or blue cones.
BLINDNESS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}

texts = st.lists(st.sampled_from(["a", "b", "<b>&amp;</b>", "", "  x", "− y", "+ z"]), max_size=9).map("\n".join)


@given(texts, texts)
@settings(max_examples=200, deadline=None)
def test_a_diff_tells_both_texts(before, after):
    found = diff(before, after, 10_000)
    if before == after:
        assert found.same
        assert found.html == ""
        return
    rows = [(kind, unescape(text)) for _, kind, _, text in LINE.findall(str(found.html))]
    assert "".join(m.group() for m in LINE.finditer(str(found.html))) == str(found.html)
    assert found.added == sum(kind == "new" for kind, _ in rows)
    assert found.removed == sum(kind == "gone" for kind, _ in rows)
    skipped = sum(int(text.split()[0]) for kind, text in rows if kind == "skip-lines")
    for text, own, other in ((before, "gone", "new"), (after, "new", "gone")):
        kept = [line for kind, line in rows if kind in (own, "same")]
        assert len(kept) + skipped == len(text.split("\n"))
        if not skipped:
            assert kept == text.split("\n"), (own, other)


def test_a_diff_of_many_lines_is_cut_and_ends_soon():
    before = "\n".join(str(n % 90) for n in range(5000))
    after = "\n".join(str(n * 7 % 90) for n in range(5000))
    found = diff(before, after, 10**6)
    assert found.cut
    assert str(found.html).count("\n") <= 2 * MOST_LINES + 3


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=30), st.integers(1, 100_000))
def test_the_level_lets_all_fit_and_wastes_nothing(lengths, room):
    level = _level(lengths, room)
    assert level >= FEWEST_CHARACTERS
    if level > FEWEST_CHARACTERS:
        assert sum(min(length, level) for length in lengths) <= room
        cut = sum(length > level for length in lengths)
        assert not cut or sum(min(length, level + 1) for length in lengths) > room - len(lengths)


@pytest.mark.slow
def test_a_hundred_tasks_of_endless_answers_stay_a_page(project):
    code = "```python\n" + "x = {'a': 1, \"b\": [2, 3]}  # <&>\n" * 12_000 + "```\n"
    answers = {(f"task-{n}", c): code for n in range(100) for c in ("base", "distilled", "teacher")}
    made = project(prompts=100, tested=100, answers=answers)
    html = page(analyse(read_evidence(made.write())))
    assert len(html.encode()) < 6_000_000
    assert html.count("more characters are not shown here. The whole answer is in generations.jsonl.") == 300
    assert html.count('<details class="fold">') == 100


def test_a_case_says_how_the_student_did(project):
    made = project(prompts=7, tested=4, scores={"base": 6.0, "distilled": 5.0, "teacher": 8.0})
    found = cases_of(analyse(read_evidence(made.write())))
    # By the tests where there are some, else by the judge.
    assert [case.change for case in found] == ["same", "same", "gained", "same", "lost", "lost", "lost"]
    assert [case.tested for case in found] == ["passed", "failed", "passed", "passed", "", "", ""]
    failed = found[1].cards[1].test
    assert (failed.passed, failed.figures, failed.detail) == (False, "1 of 4 tests", "assert double(1) == 2")


def test_a_contender_s_name_is_never_a_class(project, read):
    made = project(contenders=("base", "distilled", "teacher", "bar", "case.hidden"))
    html = read(made).page
    classes = {name for value in re.findall(r'class="([^"]*)"', html) for name in value.split()}
    assert "case.hidden" not in classes
    assert {"other0", "other1"} <= classes
    assert slot("bar", ("base", "bar", "x")) == "other0"
    # From the seventh on a colour comes again, with another marker.
    names = [f"n{n}" for n in range(7)]
    assert ink("n0", names).light == ink("n6", names).light
    assert ink("n0", names).marker != ink("n6", names).marker


def seen(colour: str, kind: str | None) -> np.ndarray:
    """A colour in CIELAB, as it is seen with a kind of colour blindness."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    if kind:
        linear = np.clip(np.array(BLINDNESS[kind]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = np.cbrt(np.maximum(xyz / [0.9505, 1.0, 1.089], 1e-9))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", [None, *BLINDNESS])
@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_contenders_stay_apart_for_every_eye(theme, kind):
    names = ["base", "distilled", "teacher", *(f"other-{n}" for n in range(len(OTHERS)))]
    colours = {name: seen(theme.colour(ink(name, names)), kind) for name in names}
    for one, another in combinations(names, 2):
        # Well beyond what is seen as a difference, some 2; but for base and distilled each has its own marker as well.
        assert np.linalg.norm(colours[one] - colours[another]) > 11, (one, another)
    assert len({ink(name, names).marker for name in names if name != "base"}) == len(names) - 1


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_colours_stand_out_on_their_ground(theme):
    def luminance(colour: str) -> float:
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    def contrast(one: str, another: str) -> float:
        low, high = sorted((luminance(one), luminance(another)))
        return (high + 0.05) / (low + 0.05)

    names = [f"other-{n}" for n in range(len(OTHERS))]
    for name in ("base", "distilled", "teacher", *names):
        # 3 is what WCAG asks of a graphic, 4.5 of text.
        assert contrast(theme.colour(ink(name, names)), theme.ground) >= (4.5 if name in names else 3), name
    for colour in (theme.text, theme.muted):
        assert contrast(colour, theme.ground) >= 4.5


def test_the_page_and_the_charts_have_the_same_colours(project, read):
    html = read(project()).page
    for name, one in {**CONTENDERS, **{f"other{n}": other for n, other in enumerate(OTHERS)}}.items():
        assert f"--{name}: light-dark({one.light.lower()}, {one.dark.lower()});" in html


@pytest.mark.parametrize(("theme", "ground"), [("light", LIGHT.ground), ("dark", DARK.ground)])
def test_charts_are_drawn_on_the_ground_that_is_asked_for(project, theme, ground):
    made = project(prompts=12, tested=12, contenders=("teacher", "base", "distilled", "another"))
    drawn = report(ReportConfig(comparison=made.write(), only="png", theme=theme)).charts
    wanted = np.array([int(ground[i : i + 2], 16) for i in (1, 3, 5)])
    for path in drawn.values():
        pixels = (imread(path)[:, :, :3] * 255).round().astype(int)
        height, width, _ = pixels.shape
        assert width == 1800
        same = np.abs(pixels - wanted).max(axis=2) <= 2
        assert same.mean() > 0.5, path.name
        edge = np.concatenate([same[:6].ravel(), same[-6:].ravel(), same[:, :6].ravel(), same[:, -6:].ravel()])
        assert edge.all(), f"{path.name} reaches its edge"
        assert height >= 500


def test_the_chart_of_tests_shows_every_contender_in_its_colour(project):
    made = project(prompts=12, tested=12)
    drawn = report(ReportConfig(comparison=made.write(), only="png")).charts["objective"]
    pixels = (imread(drawn)[:, :, :3] * 255).round().astype(int)
    for name in ("base", "distilled", "teacher"):
        colour = np.array([int(ink(name).light[i : i + 2], 16) for i in (1, 3, 5)])
        assert (np.abs(pixels - colour).max(axis=2) <= 2).sum() > 3000
