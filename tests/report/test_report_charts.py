"""The pictures: valid, of the promised width, not blank, nothing at the edge cut off."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread

from mlx_distill.config import ReportConfig
from mlx_distill.records import Usage
from mlx_distill.report.charts.sheet import _wrap
from mlx_distill.report.run import CHARTS, report

#: Those of a comparison without tests.
ALWAYS = set(CHARTS) - {"objective"}

PAID = Usage(input_tokens=9000, output_tokens=90_000)
HOSTILE = "名前 $x^2$ \\frac{ \x1b[31m </svg>"


def charts_of(project, **choices):
    return report(ReportConfig(comparison=project(**choices).write())).charts


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"judges": ("rubric", "anthropic:claude-opus-4-6"), "cut": {("task-0", "distilled")}},
        {"teacher": "anthropic:claude-sonnet-4-6", "usage": PAID, "cost_usd": 1.4},
        {"contenders": ("base", "distilled"), "splits": ("train",)},
        {"model_name": HOSTILE, "judges": (HOSTILE,)},
        {"prompts": 45, "scores": {"base": 0.0, "distilled": 0.0, "teacher": 0.0}},
    ],
)
def test_every_chart_is_a_wide_picture_with_a_clean_margin(project, choices):
    drawn = charts_of(project, **choices)
    assert set(drawn) == ALWAYS
    for path in drawn.values():
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        pixels = imread(path)[:, :, :3]
        height, width, _ = pixels.shape
        assert width == 1800
        assert height >= 500
        inked = (pixels < 0.95).any(axis=2)
        assert inked.mean() > 0.01
        edge = np.concatenate([inked[:6].ravel(), inked[-6:].ravel(), inked[:, :6].ravel(), inked[:, -6:].ravel()])
        assert not edge.any(), f"{path.name} reaches its edge"


def test_contenders_keep_their_colours_and_matplotlib_its_settings(project):
    before = mpl.rcParams.copy()
    drawn = charts_of(project)
    assert mpl.rcParams.copy() == before
    for name in ("model_scorecard", "prompt_comparison"):
        pixels = (imread(drawn[name])[:, :, :3] * 255).round().astype(int)
        for colour in ((0x72, 0x7B, 0x89), (0xCF, 0x4F, 0x00), (0x00, 0x69, 0xA8)):
            assert (np.abs(pixels - np.array(colour)).max(axis=2) <= 2).sum() > 300


def test_a_title_is_broken_where_it_would_not_fit():
    lines = _wrap("wide words " * 30, fontsize=18, weight="bold")
    assert len(lines) > 2
    assert " ".join(lines) == ("wide words " * 30).strip()
    assert _wrap("", fontsize=12) == []
