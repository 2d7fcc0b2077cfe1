"""The pictures, drawn for a slide or a README: 1800 pixels wide, readable at 1200.

matplotlib's figures are made directly, without pyplot, so that no state is shared. Foreign text (ids, model names)
is reduced to ASCII, since the font that ships with matplotlib does not know every script.
"""

from mlx_distill.report.charts.bench import Bar, bench_bars
from mlx_distill.report.charts.cost import cost_scaling
from mlx_distill.report.charts.course import training_curves
from mlx_distill.report.charts.outcomes import objective
from mlx_distill.report.charts.scores import model_scorecard, prompt_comparison

__all__ = [
    "Bar",
    "bench_bars",
    "cost_scaling",
    "model_scorecard",
    "objective",
    "prompt_comparison",
    "training_curves",
]
