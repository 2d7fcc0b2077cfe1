"""`runs` in terminals wide and narrow, in pipes and as JSON; and what an interrupted `train` says that it left."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from mlx_distill import layout
from mlx_distill.cli.columns import Column, shorten, table, width_of
from mlx_distill.cli.main import main
from mlx_distill.cli.train import kept
from mlx_distill.config import TrainConfig
from mlx_distill.training import run as training
from tests.children import ROOT, read_to_end
from tests.cli.test_command_line import HEAVY, modules_after
from tests.run_folders import RECORD, row, write, write_metrics


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["runs", *map(str, arguments)])


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two finished runs, one that was stopped, one that is damaged."""
    root = tmp_path / "adapters"
    write(root / "first")
    write(root / "second", valid_loss=1.5, config={"rank": 16, "learning_rate": 1e-4})
    write_metrics(write(root / "stopped", status="running"), row("valid", 0, 1.0), row("step", 1, 2.0))
    write(root / "broken")
    layout.RunFolder(root / "broken").record.write_text("{", encoding="utf-8")
    return root


# What is told


def test_runs_stand_side_by_side_with_what_differs(runs: Path) -> None:
    result = invoke(runs, "--sort", "loss")
    assert result.exit_code == 0
    lines = [re.split(r"\s{2,}", line) for line in result.stdout.splitlines()]
    assert [line[:2] for line in lines[:5]] == [
        ["run", "status"],
        ["second", "finished"],
        ["first", "finished"],
        ["stopped", "stopped at step 1 of 9"],
        ["broken", "damaged"],
    ]
    assert lines[1][2:-1] == ["2.500 → 1.500", "50.0 %", "1.900", "3", "250", "2.0 GB", "12.5 s"]
    assert lines[3][2:-1] == ["2.000 → 2.000", "25.0 %", "–", "0.3 of 3", "100", "–", "2.0 s"]
    assert "\nSettings that differ\nrun      rank  learning rate\nsecond   16    0.0001\nfirst    8     0.0002\n" in (
        result.stdout
    )
    assert "\nThe same in all: Model, 10 rows of 1,000 tokens, 3 epochs, all layers.\n" in result.stdout
    assert result.stdout.endswith(
        "\nbroken is damaged: run.json: Invalid JSON: EOF while parsing an object at line 1 column 1.\n"
    )


def test_a_run_that_stopped_early_says_so(tmp_path: Path) -> None:
    write(tmp_path / "run", steps=6, epochs=2, stopped_early=True)
    row_of_run = invoke(tmp_path).stdout.splitlines()[1]
    assert "  finished early, at step 6 of 9  " in row_of_run
    assert "  2 of 3  " in row_of_run


def test_one_run_alone_has_its_settings(runs: Path) -> None:
    out = invoke(runs / "second").stdout
    assert "Settings that differ" not in out
    assert "\nSettings: Model, 10 rows of 1,000 tokens, 3 epochs, rank 16, all layers, learning rate 0.0001.\n" in out


def distilled(root: Path, divergence: float, kind: str = "forward-kl", **settings: Any) -> Path:
    return write(root, first_divergence=1.5, divergence=divergence, config={"distill": kind, **settings})


def test_the_nearest_to_the_teacher_comes_first_and_what_has_no_teacher_after(runs: Path) -> None:
    distilled(runs / "far", 0.75)
    distilled(runs / "near", 0.0)
    distilled(runs / "between", 0.5)
    out = invoke(runs, "--sort", "divergence").stdout
    lines = [re.split(r"\s{2,}", line) for line in out.splitlines()[:8]]
    assert [line[0] for line in lines] == ["run", "near", "between", "far", "first", "second", "stopped", "broken"]
    assert [line[3] for line in lines[:5]] == ["divergence", "1.500 → 0.000", "1.500 → 0.500", "1.500 → 0.750", "–"]
    assert "divergence" not in invoke(runs / "first").stdout


def test_divergences_of_two_kinds_are_not_offered_for_comparison(tmp_path: Path) -> None:
    warning = "Not all learned by the same divergence"
    distilled(tmp_path / "one", 0.5, distill_beta=0.1)
    distilled(tmp_path / "other", 0.75, distill_beta=0.9)
    assert warning not in invoke(tmp_path).stdout
    distilled(tmp_path / "jsd", 0.25, "jsd", distill_beta=0.1)
    assert warning in invoke(tmp_path).stdout


def test_losses_on_other_rows_are_not_offered_for_comparison(runs: Path) -> None:
    warning = "do not compare their losses"
    assert warning not in invoke(runs).stdout
    write(runs / "other", splits={"valid": {**RECORD["splits"]["valid"], "sha256": "d" * 64}})
    assert warning in invoke(runs).stdout


def test_json_is_one_object_with_every_figure(runs: Path) -> None:
    (runs / "first" / "run.json").write_text(
        (runs / "first" / "run.json").read_text(encoding="utf-8").replace('"rank": 8', '"rank": NaN'), encoding="utf-8"
    )
    result = invoke(runs, "--json", "--sort", "loss")
    assert result.exit_code == 0
    assert result.stdout.count("\n") == 1
    data = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["folder"] == str(runs)
    assert [(run["name"], run["status"], run["valid_loss"]) for run in data["runs"]] == [
        ("second", "finished", 1.5),
        ("first", "finished", 1.75),
        ("stopped", "stopped", 2.0),
        ("broken", "damaged", None),
    ]
    assert data["settings_that_differ"] == {
        "rank": {"second": 16, "first": "nan", "stopped": 8},
        "learning_rate": {"second": 1e-4, "first": 2e-4, "stopped": 2e-4},
    }


@pytest.mark.parametrize("flags", [[], ["adapters"]])
def test_before_the_first_run_the_next_step_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        result = invoke(*flags)
        assert result.exit_code == 0
        assert result.stdout.startswith("No runs in adapters.\nThe first:  mlx-distill train --data data/NAME --run ")
        assert json.loads(invoke(*flags, "--json").stdout) == {
            "folder": "adapters",
            "runs": [],
            "settings_that_differ": {},
        }
        (tmp_path / "adapters").mkdir(exist_ok=True)


@pytest.mark.parametrize("name", ["adaptres", "file", "n" * 300, "file/below", "circle", "not-text-\udcff"])
def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "circle").symlink_to("circle")
    result = invoke(tmp_path / name)
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: ")
    assert result.stdout == ""


def test_another_order_is_a_mistake() -> None:
    result = invoke("--sort", "name")
    assert result.exit_code == 2
    assert "--sort = 'name': must be 'created', 'loss', 'divergence', 'accuracy' or 'time'." in result.stderr


def test_listing_needs_no_engine(runs: Path) -> None:
    assert modules_after("runs", str(runs)) & HEAVY == set()


# Foreign names


def test_names_can_hide_nothing(tmp_path: Path) -> None:
    names = ("a\nb", "c\x1b[31mred", "d\u202edesrever", "e\tx", "\u6570\u636e", "f" * 200)
    for name in names:
        write(tmp_path / name, config={"targets": f"\x1b]0;{name}\x07"})
    out = invoke(tmp_path).stdout
    assert not set(out) & {"\x1b", "\u202e", "\t", "\x07"}
    head, *rows = out.split("\n\n")[0].splitlines()
    assert len(rows) == len(names)
    # Aligned, with wide letters counted as two.
    assert {width_of(row[: row.index("  finished")]) for row in rows} == {width_of(head[: head.index("  status")])}
    assert {run["name"] for run in json.loads(invoke(tmp_path, "--json").stdout)["runs"]} == set(names)


# Terminals and pipes


def in_terminal(columns: int, *arguments: str | Path, **environment: str) -> str:
    """What `runs` writes to a terminal of this width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    settings = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-m", "mlx_distill", "runs", *map(str, arguments)],
        env={**settings, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color", **environment},
        stdout=theirs,
        stderr=subprocess.PIPE,
    )
    os.close(theirs)
    out = read_to_end(ours)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.decode().replace("\r\n", "\n")


def is_row(line: str) -> bool:
    """Of a table; sentences are left to the terminal to break."""
    return "  " in line


@pytest.mark.parametrize("columns", [200, 80, 40])
def test_tables_fit_the_terminal_and_lose_nothing(runs: Path, columns: int) -> None:
    out = click.unstyle(in_terminal(columns, runs))
    rows = [line for line in out.splitlines() if is_row(line)]
    assert max(map(width_of, rows)) <= columns
    assert out.count("2.500 → 1.500") == 1
    for head in ("status", "validation loss", "accuracy", "test loss", "epochs", "tokens/s", "memory", "time", "rank"):
        assert len(re.findall(rf"^run .*  {head}(  |$)", out, flags=re.MULTILINE)) == 1
    assert (len([line for line in rows if line.startswith("run ")]) == 2) is (columns == 200)


def test_a_pipe_gets_a_line_a_run_and_no_colour(runs: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "mlx_distill", "runs", runs],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "40", "TERM": "xterm-256color", "FORCE_COLOR": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\x1b" not in process.stdout
    assert len(re.findall(r"^second .* 12\.5 s .*$", process.stdout, flags=re.MULTILINE)) == 1


def test_a_terminal_gets_colour_unless_it_shall_not(runs: Path) -> None:
    assert "\x1b[31mdamaged\x1b[0m" in in_terminal(120, runs)
    assert "\x1b" not in in_terminal(120, runs, NO_COLOR="1")
    assert "\x1b" not in in_terminal(120, runs, TERM="dumb")


CELLS = st.text(st.characters(categories=["L", "N", "P", "Zs", "Mn"]), max_size=30)
TABLES = st.integers(1, 4).flatmap(
    lambda rows: st.lists(
        st.builds(Column, CELLS, st.lists(CELLS, min_size=rows, max_size=rows), st.booleans()), min_size=2, max_size=9
    )
)


@given(TABLES, st.integers(20, 120))
def test_a_table_fits_any_width(columns: list[Column], width: int) -> None:
    lines = table(columns, width)
    assert all(width_of(line) <= width for line in lines)
    # Whole tables with an empty line between any two.
    tables, rest = divmod(len(lines) + 1, len(columns[0].cells) + 2)
    assert rest == 0
    assert 1 <= tables < len(columns)


@given(TABLES)
def test_a_table_without_a_width_is_one_and_whole(columns: list[Column]) -> None:
    lines = table(columns, None)
    assert len(lines) == 1 + len(columns[0].cells)
    for number, line in enumerate(lines[1:]):
        assert "".join(line.split()) == "".join("".join(c.cells[number] for c in columns).split())


@given(CELLS, st.integers(1, 40))
def test_what_is_shortened_fits_and_keeps_its_ends(text: str, width: int) -> None:
    short = shorten(text, width)
    assert width_of(short) <= width
    if short != text:
        start, _, end = short.partition("…")
        assert text.startswith(start)
        assert text.endswith(end)


# What an interrupted training says


def interrupted(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> str:
    def interrupt(*_arguments: Any, **_options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupt)
    result = CliRunner().invoke(main, ["train", "--data", str(config.data), "--run", str(config.run)])
    assert result.exit_code == 130
    assert result.stdout == ""
    assert result.stderr == f"\nInterrupted. {kept(config)}\n"
    return result.stderr


def test_an_interruption_claims_no_checkpoint_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(data=tmp_path / "data", run=tmp_path / "run")
    folder = layout.RunFolder(config.run)
    none = "\nInterrupted. No checkpoint had been saved yet; the same command goes on from the start.\n"
    assert interrupted(config, monkeypatch) == none
    folder.checkpoints.mkdir(parents=True)
    (folder.checkpoints / ".step-00000001.part-abcdefgh.safetensors").touch()
    assert interrupted(config, monkeypatch) == none
    (folder.checkpoints / "step-00000001.safetensors").touch()
    last = "\nInterrupted. The last checkpoint stands; the same command goes on from it.\n"
    assert interrupted(config, monkeypatch) == last
    folder.record.write_text("{", encoding="utf-8")
    assert interrupted(config, monkeypatch) == last


def test_an_interruption_after_the_end_says_that_the_run_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(data=tmp_path / "data", run=write(tmp_path / "run"))
    assert f"The run in {config.run} is finished, and whole." in interrupted(config, monkeypatch)
