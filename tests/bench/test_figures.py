"""What turns add up to: exact figures of made-up turns."""

from __future__ import annotations

import pytest

from mlx_distill.bench.figures import figures_of, find_parity, in_turn, project, ratios_to
from mlx_distill.bench.page import as_html, as_markdown, duration
from mlx_distill.bench.records import BenchRecord, Epoch, Timing, Turn


def timing(backend: str, *epochs: list[float], tokens: int = 100, **changes: object) -> Timing:
    values = {
        "backend": backend,
        "device": "CPU, float32",
        "ways": "plainly",
        "trainable": 10,
        "first_step_seconds": 3.0,
        "epochs": [Epoch(seconds=sum(steps), tokens=tokens, step_seconds=steps) for steps in epochs],
        "losses": [2.0, 1.5],
        "peak_bytes": 10**9,
        "device_bytes": 5 * 10**8,
    }
    return Timing.model_validate({**values, **changes})


def turns() -> list[Turn]:
    return [
        # Ends after a few steps: not a measurement.
        Turn(backend="mlx", number=0, timing=timing("mlx", [0.1], tokens=5, peak_bytes=10**12)),
        Turn(backend="mlx", number=1, timing=timing("mlx", [1.0, 1.0], [0.5, 0.5])),
        Turn(backend="torch", number=1, timing=timing("torch", [2.0, 2.0], [2.0, 2.0])),
        Turn(backend="torch", number=2, timing=timing("torch", [3.0, 3.0], [3.0, 3.0], peak_bytes=2 * 10**9)),
        Turn(backend="mlx", number=2, timing=timing("mlx", [1.0, 2.0], [0.5, 0.5], joules=50.0)),
        Turn(backend="mlx", number=3, timing=timing("mlx", [9.0, 9.0], [9.0, 9.0])),
        Turn(backend="torch", number=3, failure="killed by SIGKILL: out of memory?"),
    ]


def test_figures_are_medians_over_turns() -> None:
    found = figures_of("mlx", turns())
    assert found.first_epoch is not None
    assert found.later_epoch is not None
    assert found.tokens_per_second is not None
    assert (found.first_epoch.median, found.first_epoch.least, found.first_epoch.most) == (3.0, 2.0, 18.0)
    assert found.later_epoch.median == 1.0
    assert found.tokens_per_second.median == 200 / 4
    assert found.step_p50 == 1.0
    assert found.joules_per_token == 50 / 200
    assert figures_of("torch", turns()).peak_bytes == 2 * 10**9


def test_a_ratio_is_of_one_turn_with_its_own() -> None:
    ratio = ratios_to("mlx", [turn for turn in turns() if turn.number])["torch"]
    # 8 s against 3, and 12 against 4; the third turn has but one.
    assert (ratio.least, ratio.most) == pytest.approx((8 / 3, 3.0))
    assert ratio.median == pytest.approx((8 / 3 + 3) / 2)
    assert ratios_to("mlx", [turn for turn in turns() if turn.backend == "mlx"]) == {}


def test_what_failed_says_so_and_what_was_measured_stays() -> None:
    assert figures_of("torch", turns()).failure == "killed by SIGKILL: out of memory?"
    assert figures_of("torch", turns()).first_epoch is not None
    only = figures_of("torch", [Turn(backend="torch", number=0, failure="no such device")])
    assert only.first_epoch is None
    assert only.failure == "no such device"


def test_a_projection_counts_the_first_epoch_once() -> None:
    first, *others = project(10, [figures_of("mlx", turns()), figures_of("torch", turns())])
    assert first.rows == 104
    # 3 s, then four times 1 s, for ten rows.
    assert first.seconds["mlx"] == pytest.approx(7 * 10.4)
    assert first.seconds["torch"] == pytest.approx(25 * 10.4)
    assert [one.rows for one in others] == [10_000, 1_000_000]


@pytest.mark.parametrize(
    ("losses", "device", "passes"),
    [
        ([2.0, 1.5], "CPU, float32", True),
        ([2.0001, 1.5], "CPU, float32", True),
        ([2.0, 1.501], "CPU, float32", False),
        ([2.0, 1.501], "GPU, bfloat16", True),
        ([2.0, 1.6], "GPU, bfloat16", False),
        ([2.0, float("nan")], "CPU, float32", False),
    ],
)
def test_parity_is_of_losses_in_their_type(losses: list[float], device: str, passes: bool) -> None:
    first = Turn(backend="mlx", number=0, timing=timing("mlx", [1.0], device=device))
    other = Turn(backend="torch", number=0, timing=timing("torch", [1.0], device=device, losses=losses))
    parity = find_parity([first, other])
    assert parity is not None
    assert (parity.largest <= parity.limit) == passes
    assert parity.steps == 2
    assert find_parity([first]) is None


def test_each_is_first_as_often_as_the_others() -> None:
    assert [in_turn(["a", "b", "c"], number)[0] for number in range(6)] == ["a", "b", "c", "a", "b", "c"]
    assert sorted(in_turn(["a", "b", "c"], 2)) == ["a", "b", "c"]


def record(**changes: object) -> BenchRecord:
    figures = [figures_of(name, turns()) for name in ("mlx", "torch")]
    values = {
        "created": "2026-01-02T03:04:05+00:00",
        "command": "mlx-distill bench --model <x>",
        "machine": {"system": "macOS 15.1", "processor": "M4 | Max", "mlx": "0.32.4"},
        "model": "<script>alert(1)</script>",
        "rows": 10,
        "tokens": 100,
        "epochs": 2,
        "settings": {"batch_size": 4, "rank": 8, "layers": 16},
        "figures": figures,
        "ratios": ratios_to("mlx", turns()),
        "projections": project(10, figures),
        "turns": turns(),
    }
    return BenchRecord.model_validate({**values, **changes})


def test_the_text_for_an_issue_has_machine_command_and_table() -> None:
    text = as_markdown(record())
    assert "mlx is 2.83 times (2.67 to 3.00) as fast as torch." in text
    assert "macOS 15.1, M4 | Max, mlx 0.32.4" in text
    assert "`mlx-distill bench --model <x>`, 2026-01-02" in text
    assert "torch: killed by SIGKILL" in text
    heads = [line for line in text.splitlines() if line.startswith("| backend")]
    assert len(heads) == 1
    assert all(
        line.count("|") == heads[0].count("|") for line in text.splitlines() if line.startswith(("| mlx", "| torch"))
    )


def test_the_page_needs_nothing_and_runs_nothing() -> None:
    page = as_html(record())
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "http" not in page
    assert page.count("<table>") == 2


@pytest.mark.parametrize(
    ("seconds", "says"),
    [(0.0123, "12 ms"), (1.0, "1.0 s"), (119.9, "119.9 s"), (120, "2.0 min"), (7200, "2.0 h"), (864_000, "10.0 days")],
)
def test_durations_are_said_as_a_person_would(seconds: float, says: str) -> None:
    assert duration(seconds) == says
