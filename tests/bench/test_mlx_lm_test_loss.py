"""`scripts/mlx_lm_test_loss`: the real `mlx_lm.lora --test` beside our test loss, on an adapter of ours."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_distill.layout import DataFolder, RunFolder
from mlx_distill.training.run import train
from tests.training.runs import make_data, settings

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "mlx_lm_test_loss"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A finished run. Do not write into it."""
    folder = tmp_path_factory.mktemp("test-loss")
    train(settings(make_data(folder / "data", test=5), tiny_model, folder / "run"))
    return folder / "run"


def compare(run: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, run, *flags], capture_output=True, text=True, check=False)


def shares(printed: str) -> list[float]:
    """How far ours is from theirs, over the same tokens and over the answers alone."""
    return [float(share) / 100 for share in re.findall(r"\| ([0-9.]+)% \|", printed)]


def test_the_command_of_mlx_lm_has_our_loss_over_the_tokens_that_it_counts(run: Path) -> None:
    done = compare(run)
    assert done.returncode == 0, done.stderr
    same, without_padding = shares(done.stdout)
    assert same < 1e-3 < without_padding
    record = json.loads(RunFolder(run).record.read_text(encoding="utf-8"))
    assert f"`train` printed {record['test_loss']:.4f}." in done.stdout


def test_a_difference_is_an_error(run: Path) -> None:
    """mlx-lm rounds what it prints, so that there is always some."""
    done = compare(run, "--tolerance", "0")
    assert done.returncode == 1
    assert "over the same tokens the two are" in done.stderr


def test_what_cannot_be_compared_is_refused(run: Path, tmp_path: Path, tiny_model: Path) -> None:
    done = compare(tmp_path / "nowhere")
    assert (done.returncode, done.stdout) == (1, "")
    assert "Train first" in done.stderr
    data = make_data(tmp_path / "data", train=3)
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    DataFolder(data).split("test").write_text(json.dumps({"messages": [*turn, *turn]}) + "\n", encoding="utf-8")
    train(settings(data, tiny_model, tmp_path / "run", epochs=1))
    done = compare(tmp_path / "run")
    assert done.returncode == 1
    assert "test.jsonl:1: mlx-lm has no mask for this row" in done.stderr
