"""The scripts that measure distillation: what they print of what they have, also when stopped, and what they keep."""

from __future__ import annotations

import json
import re
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.errors import InputError
from mlx_distill.layout import read_record

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

from _bench.learned import Figures, Learned

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

FOUND = {
    "untrained": [Figures(loss=4.5, apart=1.2)],
    "text": [Figures(loss=3.9, apart=1.3, seconds=2.0), Figures(loss=4.1, apart=1.25, seconds=4.0)],
    "JSD": [Figures(loss=4.625, apart=0.75, seconds=3.0)],
}


def learned(found: dict[str, list[Figures]]) -> Learned:
    return Learned(
        machine="here",
        date="2026-11-25",
        model="models/big",
        keep_layers=24,
        rows=16,
        epochs=3,
        seeds=2,
        learning_rate=1e-3,
        found=found,
    )


def run(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_table_has_the_means_and_the_least_and_most_of_the_seeds() -> None:
    lines = list(learned(FOUND | {"reverse KL": []}).table())
    assert lines[4:] == [
        "| the pruned model, untrained | 4.500 | 1.200 |  |",
        "| the text | 4.000 (3.900 to 4.100) | 1.275 (1.250 to 1.300) | 3.00 s |",
        "| JSD | 4.625 | 0.750 | 3.00 s |",
    ]
    assert "big teaches itself with 24 of its layers; 16 rows, 3 epochs, 2 seeds" in lines[0]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "Each comes nearer to what it learned from"),
        ({"JSD": [Figures(loss=3.5, apart=0.8)]}, "Nearest to the text: JSD; nearest to the teacher: JSD"),
        ({"JSD": [Figures(loss=4.6, apart=1.26)]}, "Nearest to the text: the text; nearest to the teacher: JSD"),
        ({"untrained": [Figures(loss=3.0, apart=1.2)]}, "Nearest to the text: the text; nearest to the teacher: JSD"),
        ({"text": []}, "Nearest to the text: JSD; nearest to the teacher: JSD"),
        ({"JSD": []}, "Nearest to the text: the text; nearest to the teacher: the text"),
    ],
)
def test_the_finding_claims_no_more_than_the_means_show(changes: dict[str, list[Figures]], said: str) -> None:
    assert learned(FOUND | changes).finding().startswith(said)


def test_kept_figures_are_the_same_again_and_draw_a_chart(tmp_path: Path) -> None:
    kept, chart = tmp_path / "kept.json", tmp_path / "new" / "chart.png"
    kept.write_text(learned(FOUND).model_dump_json(exclude_none=True), encoding="utf-8")
    assert read_record(kept, Learned) == learned(FOUND)
    pictures = []
    for theme in ("light", "dark"):
        done = run("distill_table", "--from", kept, "--chart", chart, "--theme", theme)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == "\n".join(learned(FOUND).table()) + "\n"
        pictures.append(chart.read_bytes())
        assert pictures[-1][:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">I", pictures[-1][16:20]) == (1800,)
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"format": 2}', "\xff", None])
def test_a_file_of_anything_else_is_refused(content: str | None, tmp_path: Path) -> None:
    kept = tmp_path / "kept.json"
    if content is not None:
        kept.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"kept\.json"):
        read_record(kept, Learned)


def test_figures_of_no_training_are_refused_and_nothing_is_drawn(tmp_path: Path) -> None:
    kept, chart = tmp_path / "kept.json", tmp_path / "chart.png"
    kept.write_text(learned({"untrained": FOUND["untrained"]}).model_dump_json(exclude_none=True), encoding="utf-8")
    done = run("distill_table", "--from", kept, "--chart", chart)
    assert done.returncode == 1
    assert re.fullmatch(r"error: .*kept\.json.*no figures of a training.*\n", done.stderr)
    assert not chart.exists()


@pytest.mark.parametrize("arguments", [["--contenders", "text,none"], ["--epochs", "1"], ["--repeats", "0"]])
def test_what_cannot_be_measured_is_refused_before_anything_is(arguments: list[str]) -> None:
    done = run("bench_distill", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def cells(table: str) -> dict[str, list[str]]:
    """The lines of Markdown tables, by their first cell."""
    lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return {line[0]: line[1:] for line in lines}


TINY = ("--rows", "8", "--answer-tokens", "12", "--layers", "2", "--top-k", "8")


@pytest.mark.slow
def test_bench_distill_times_each_step_and_its_parts(tiny_model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "steps.json"
    chosen = "text,jsd,online,on-policy"
    done = run("bench_distill", "--model", tiny_model, *TINY, "--repeats", "2", "--contenders", chosen, "--json", kept)
    assert done.returncode == 0, done.stderr
    found = cells(done.stdout)
    assert set(found) >= {"text alone", "JSD", "forward KL, teacher online", "reverse KL, on-policy", "median"}
    assert found["text alone"][1] == "1.00 (1.00 to 1.00)"
    # Of four rows with twelve tokens of an answer each, what ends a turn beside them.
    assert 4 * 12 <= int(found["JSD"][2]) <= 4 * 16
    assert found["JSD"][2] == found["text alone"][2] == found["forward KL, teacher online"][2]
    assert 4 <= int(found["reverse KL, on-policy"][2]) <= 4 * 12
    assert "K = 8: 40 bytes a position" in done.stdout
    turns: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))["turns"]
    assert list(turns) == chosen.split(",")
    for name, own in turns.items():
        assert list(own) == ["1", "2"]
        for step in (step for turn in own.values() for step in turn["steps"]):
            assert (step["writing"] > 0) == (name == "on-policy")
            assert 0 <= step["writing"] + step["scoring"] <= step["seconds"]
        # Of two epochs with two steps each, those of the second.
        assert [len(turn["steps"]) for turn in own.values()] == [2, 2]


@pytest.mark.slow
def test_an_interrupted_bench_prints_what_it_has(tiny_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPTS / "bench_distill", "--model", tiny_model, *TINY, "--contenders", "text,online"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("turn 1, text: "):
                break
        child.send_signal(signal.SIGINT)
        out, error = child.communicate(timeout=120)
    assert child.returncode == 130
    assert error.endswith("Interrupted.\n")
    found = cells(out)
    assert found["text alone"][1] == "1.00"
    assert "forward KL, teacher online" not in found


@pytest.mark.slow
def test_distill_table_trains_every_way_and_keeps_what_it_found(tiny_model: Path, tmp_path: Path) -> None:
    kept, chart = tmp_path / "kept.json", tmp_path / "chart.png"
    small = ("--keep-layers", "2", "--rows", "4", "--epochs", "1", "--seeds", "1")
    done = run("distill_table", "--model", tiny_model, *small, "--json", kept, "--chart", chart)
    assert done.returncode == 0, done.stderr
    found = read_record(kept, Learned)
    assert done.stdout == "\n".join(found.table()) + "\n"
    assert list(found.found) == ["untrained", "text", "forward KL", "reverse KL", "JSD", "on-policy, reverse KL"]
    assert all(len(own) == 1 for own in found.found.values())
    # A step of four rows in float32 moves each a little, and none the same way.
    assert len({own[0].loss for own in found.found.values()}) == 6
    assert min(own[0].apart for own in found.found.values()) > 0
    assert chart.stat().st_size > 0
