"""How far base and student are from a local teacher's distribution on held-out answers: exact, once, and never in the
way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm.utils import load

from mlx_distill.agreement import ProbeRow
from mlx_distill.backends.mlx.generation import Generator
from mlx_distill.batches import TeacherBuckets
from mlx_distill.cli.main import main
from mlx_distill.compare.distribution import Source, read_teacher
from mlx_distill.compare.held_out import held_out_rows
from mlx_distill.compare.run import compare
from mlx_distill.config import DEFAULT_TOP_K, CompareConfig, FuseConfig
from mlx_distill.fuse import fuse
from mlx_distill.layout import ComparisonFolder, read_rows
from mlx_distill.progress import SILENT, Bar
from mlx_distill.runs import read_run
from mlx_distill.scores import HeldOutLoss
from mlx_distill.training.run import train
from tests.tiny import make_tiny_model
from tests.training.runs import Recorder, make_data, settings

WORDS = 384


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, teacher: Path) -> Path:
    """A run that learned the teacher's distribution, and its fused model. Do not write into it."""
    folder = tmp_path_factory.mktemp("distilled")
    made = settings(
        make_data(folder / "data"),
        tiny_model,
        folder / "tuned",
        epochs=3,
        learning_rate=0.02,
        distill="reverse-kl",
        teacher_online=f"mlx:{teacher}",
    )
    train(made)
    fuse(FuseConfig(run=made.run))
    return made.run


@pytest.fixture
def config(run: Path, tmp_path: Path) -> CompareConfig:
    (tmp_path / "prompts.txt").write_text("add two numbers\n", encoding="utf-8")
    return CompareConfig(run=run, prompts=tmp_path / "prompts.txt", max_tokens=4, out=tmp_path / "visuals")


def changed(config: CompareConfig, **changes: Any) -> CompareConfig:
    return CompareConfig.model_validate({**config.model_dump(), **changes})


def found(config: CompareConfig) -> list[HeldOutLoss]:
    assert config.out is not None
    return read_rows(ComparisonFolder(config.out).held_out, HeldOutLoss)


def write(config: CompareConfig, rows: list[HeldOutLoss]) -> None:
    assert config.out is not None
    ComparisonFolder(config.out).held_out.write_text("".join(row.to_json() + "\n" for row in rows), encoding="utf-8")


def marked(config: CompareConfig) -> list[HeldOutLoss]:
    """The rows that are there, with a loss that no model has: who reads them again takes it away."""
    rows = [row.model_copy(update={"nll": 12345.0}) for row in found(config)]
    write(config, rows)
    return rows


def rows_of(run: Path, model: Path) -> dict[str, ProbeRow]:
    return held_out_rows(read_run(run), model, 64, SILENT)


def log_probs(folder: Path, row: ProbeRow) -> np.ndarray:
    """Of all words at a row's positions, by mlx-lm and numpy."""
    model, _ = load(str(folder))
    model.set_dtype(mx.float32)
    logits = np.array(model(mx.array([row.tokens]))[0]).astype(np.float64)[list(row.positions)]
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def bucketed(logs: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Probabilities of some words, and of all others together."""
    named = np.take_along_axis(np.exp(logs), ids, axis=-1)
    return np.concatenate([named, 1 - named.sum(axis=-1, keepdims=True)], axis=-1)


class Watching(Recorder):
    """Keeps what was said and begun; raises after some rows that a contender read."""

    def __init__(self, stop: tuple[str, int] | None = None) -> None:
        super().__init__()
        self.titles: list[str] = []
        self._stop = stop

    @contextmanager
    def task(self, title: str, total: float | None = None, *, unit: str = "") -> Iterator[Bar]:
        self.titles.append(title)
        stop = self._stop

        class Stopping(Bar):
            count = 0

            def advance(self, amount: float = 1, **fields: str) -> None:
                self.count += 1
                if stop is not None and title.startswith(stop[0]) and self.count == stop[1]:
                    raise KeyboardInterrupt

        yield Stopping()

    @property
    def read(self) -> list[str]:
        return [title.partition(" reads")[0] for title in self.titles if "reads" in title]


# What is measured


def test_over_the_whole_vocabulary_it_is_the_divergence_of_the_whole_logits(
    run: Path, tiny_model: Path, teacher: Path
) -> None:
    rows = rows_of(run, tiny_model)
    said = read_teacher(Source("x", teacher, "x@1", WORDS), rows, SILENT)
    assert said is not None and set(said.buckets) == set(rows)
    generator = Generator(tiny_model)
    for sha256, row in rows.items():
        p, q = log_probs(teacher, row), log_probs(tiny_model, row)
        read = generator.read(row, said.buckets[sha256])
        assert read.divergence == pytest.approx(float((np.exp(p) * (p - q)).sum()), rel=1e-5)
        assert read.nll == generator.read(row).nll
        assert generator.read(row).divergence is None


@pytest.mark.parametrize("named", [True, False])
def test_what_a_comparison_notes_is_the_formula(
    config: CompareConfig, run: Path, tiny_model: Path, teacher: Path, *, named: bool
) -> None:
    """Of the teacher that is compared, and without one, of that which the student learned from."""
    compare(changed(config, teacher=f"mlx:{teacher}") if named else config)
    rows = rows_of(run, tiny_model)
    assert {(row.contender, row.row_sha256) for row in found(config)} == {
        (contender, sha256) for contender in ("base", "distilled") for sha256 in rows
    }
    folders = {"base": tiny_model, "distilled": run / "fused"}
    for loss in found(config):
        row = rows[loss.row_sha256]
        logs = log_probs(teacher, row)
        ids = np.argsort(-logs, axis=-1)[:, :DEFAULT_TOP_K]
        p, q = bucketed(logs, ids), bucketed(log_probs(folders[loss.contender], row), ids)
        assert loss.divergence == pytest.approx(float((p * np.log(p / q)).sum()), rel=1e-4)
        assert loss.top_k == DEFAULT_TOP_K
        assert loss.teacher is not None and loss.teacher.startswith(f"{teacher}@")
    total = {c: sum(row.divergence or 0.0 for row in found(config) if row.contender == c) for c in folders}
    assert total["distilled"] < total["base"], "it learned to be nearer"


def test_a_model_is_no_way_from_itself(config: CompareConfig, tiny_model: Path) -> None:
    compare(changed(config, teacher=f"mlx:{tiny_model}"))
    for row in found(config):
        assert row.divergence is not None
        if row.contender == "base":
            assert row.divergence == pytest.approx(0, abs=1e-6 * row.tokens)
        else:
            assert row.divergence > 0.01 * row.tokens


def test_a_word_that_the_model_lacks_is_infinitely_far(run: Path, tiny_model: Path) -> None:
    row = next(iter(rows_of(run, tiny_model).values()))
    count = len(row.positions)
    ids = np.tile(np.array([[1, WORDS]], np.int32), (count, 1))
    even = np.full((count, 3), np.log(1 / 3), np.float32)
    assert Generator(tiny_model).read(row, TeacherBuckets(ids, even)).divergence == np.inf


def test_the_summary_tells_it(config: CompareConfig, teacher: Path) -> None:
    arguments = ["compare", str(config.run), "--prompts", str(config.prompts), "--max-tokens", "4"]
    result = CliRunner().invoke(main, [*arguments, "--out", str(config.out)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].split()[-1] == "divergence"
    rows = {line.split()[0]: line.split()[-1] for line in lines[1:3]}
    for contender, told in rows.items():
        own = [row for row in found(config) if row.contender == contender]
        assert told == f"{sum(row.divergence or 0 for row in own) / sum(row.tokens for row in own):.3f}"
    assert any(line.startswith(f"  divergence: from {teacher}@") for line in lines)
    machine = CliRunner().invoke(main, [*arguments, "--out", str(config.out), "--json"])
    objective = json.loads(machine.stdout)["objective"]
    assert f"{objective['base']['divergence']:.3f}" == rows["base"]
    off = CliRunner().invoke(main, [*arguments, "--out", str(config.out), "--divergence", "off"])
    assert off.exit_code == 0 and "divergence" not in off.stdout and "perplexity" in off.stdout


# What is kept


def test_it_is_read_once(config: CompareConfig) -> None:
    first = Watching()
    compare(config, first)
    assert first.read == ["The teacher", "Base", "Distilled"]
    rows = marked(config)
    again = Watching()
    compare(config, again)
    assert again.titles == [] and found(config) == rows


def test_what_was_read_without_it_is_read_again(config: CompareConfig) -> None:
    """A file that was written before there was such a thing."""
    compare(config)
    whole = found(config)
    old = [
        {key: value for key, value in row.model_dump().items() if key not in ("divergence", "teacher", "top_k")}
        for row in marked(config)
    ]
    assert config.out is not None
    ComparisonFolder(config.out).held_out.write_text("".join(json.dumps(row) + "\n" for row in old), encoding="utf-8")
    assert all(row.divergence is row.teacher is row.top_k is None for row in found(config))
    compare(config)
    assert found(config) == whole


@pytest.mark.parametrize("how", ["named", "same name", "fewer words"])
def test_another_teacher_reads_anew(config: CompareConfig, tmp_path: Path, teacher: Path, how: str) -> None:
    own = tmp_path / "teacher"
    shutil.copytree(teacher, own)
    compare(changed(config, teacher=f"mlx:{own}"))
    before = found(config)
    rows = marked(config)
    other = own
    if how == "named":
        other = make_tiny_model(tmp_path / "other", seed=9)
    elif how == "same name":
        shutil.rmtree(own)
        make_tiny_model(own, seed=9)
    else:
        write(config, [row.model_copy(update={"top_k": 3}) for row in rows])
    compare(changed(config, teacher=f"mlx:{other}"))
    after = found(config)
    assert [row.nll for row in after] == [row.nll for row in before]
    assert len({row.teacher for row in (*before, *after)}) == (1 if how == "fewer words" else 2)
    same = [a.divergence == b.divergence for a, b in zip(before, after, strict=True)]
    assert all(same) if how == "fewer words" else not any(same)


@pytest.mark.parametrize("place", [("The teacher reads", 2), ("Base reads", 1), ("Distilled reads", 1)])
def test_an_interrupted_reading_goes_on(config: CompareConfig, tmp_path: Path, place: tuple[str, int]) -> None:
    compare(config)
    whole = found(config)
    again = changed(config, out=tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        compare(again, Watching(place))
    kept = marked(again)
    assert len(kept) == {"The teacher reads": 0, "Base reads": 1, "Distilled reads": 3}[place[0]]
    compare(again)
    assert {row.nll for row in found(again)[: len(kept)]} <= {12345.0}, "what was read stays"
    assert [(row.contender, row.row_sha256, row.divergence, row.teacher) for row in found(again)] == [
        (row.contender, row.row_sha256, row.divergence, row.teacher) for row in whole
    ]


def test_switched_off_it_is_gone_and_the_losses_stay(config: CompareConfig) -> None:
    compare(config)
    rows = marked(config)
    watching = Watching()
    compare(changed(config, divergence="off"), watching)
    bare = {"divergence": None, "teacher": None, "top_k": None}
    assert found(config) == [row.model_copy(update=bare) for row in rows]
    assert watching.titles == []
    fresh = Watching()
    assert config.out is not None
    shutil.rmtree(config.out)
    compare(changed(config, divergence="off"), fresh)
    assert fresh.read == ["Base", "Distilled"]
    assert all(row.teacher is None for row in found(config))


# What is in the way


@pytest.fixture
def own(config: CompareConfig, run: Path, tmp_path: Path) -> CompareConfig:
    """A comparison of a copy of the run, to change what it was distilled from."""
    shutil.copytree(run, tmp_path / "own")
    return changed(config, run=tmp_path / "own")


def distilled_from(config: CompareConfig, spec: str | None) -> None:
    path = config.run / "run.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["distilled_from"] = spec
    path.write_text(json.dumps(record), encoding="utf-8")


@pytest.mark.parametrize("spec", ["/nowhere/at/all", "someone/not-here", "x.gguf", "smollm2-135m"])
def test_a_teacher_that_is_not_here_is_told_and_not_fetched(
    own: CompareConfig, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    distilled_from(own, spec)
    told = Watching()
    compare(own, told)
    assert told.said == [f"{spec} is not on this machine: the divergence from the teacher is left out."]
    assert told.read == ["Base", "Distilled"]
    assert all(row.divergence is row.teacher is None for row in found(own))


def test_what_was_measured_stays_when_the_teacher_is_gone(own: CompareConfig, teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "gone")
    distilled_from(own, str(tmp_path / "gone"))
    compare(own)
    rows = marked(own)
    assert all(row.divergence is not None for row in rows)
    shutil.rmtree(tmp_path / "gone")
    compare(own)
    assert found(own) == rows
    # Of another that is not here either, it says nothing.
    distilled_from(own, "/nowhere")
    compare(own)
    assert all(row.divergence is row.teacher is None and row.nll == 12345.0 for row in found(own))


def test_another_tokenizer_is_told(own: CompareConfig, tmp_path: Path) -> None:
    other = make_tiny_model(tmp_path / "other", vocabulary=300)
    distilled_from(own, str(other))
    told = Watching()
    compare(own, told)
    (said,) = told.said
    assert said.startswith(f"{other} and the student do not have the same tokenizer (their vocabularies differ: ")
    assert said.endswith("): the divergence from the teacher is left out.")
    assert all(row.teacher is None for row in found(own))


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def other_shape(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "hidden_size": 32}), encoding="utf-8")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")


@pytest.mark.parametrize("damage", [no_weights, other_shape, no_tokenizer])
def test_a_damaged_teacher_is_told_and_stops_nothing(
    own: CompareConfig, teacher: Path, tmp_path: Path, damage: Any
) -> None:
    shutil.copytree(teacher, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    distilled_from(own, str(tmp_path / "damaged"))
    told = Watching()
    compare(own, told)
    (line,) = told.said
    assert line.startswith(f"{tmp_path / 'damaged'} cannot be read (")
    assert line.endswith("): the divergence from the teacher is left out.") and "\n" not in line
    assert told.read == ["Base", "Distilled"]
    assert len(found(own)) == 4 and all(row.teacher is None for row in found(own))


def test_without_a_local_teacher_nothing_is_said(own: CompareConfig) -> None:
    distilled_from(own, None)
    told = Watching()
    compare(own, told)
    assert told.said == []
    assert told.read == ["Base", "Distilled"]


def test_without_held_out_answers_nobody_is_asked(own: CompareConfig, tmp_path: Path) -> None:
    record = json.loads((own.run / "run.json").read_text(encoding="utf-8"))
    record["config"]["data"] = str(make_data(tmp_path / "bare", valid=0, test=0))
    (own.run / "run.json").write_text(json.dumps(record), encoding="utf-8")
    told = Watching()
    compare(own, told)
    assert told.said == ["The run's data has no held-out answers: perplexity and divergence are left out."]
    assert told.read == []
