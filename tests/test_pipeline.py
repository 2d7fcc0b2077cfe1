"""The walk through a recipe: what is skipped, what runs again and why, and that nothing made is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_distill import fuse, layout, prompts
from mlx_distill.cli.main import main
from mlx_distill.collect import run as collecting
from mlx_distill.compare import run as compare
from mlx_distill.errors import ConfigError, FolderError, InputError, OccupiedError, TeacherError
from mlx_distill.judges import run as judging
from mlx_distill.manifest import Manifest
from mlx_distill.models.folder import fingerprint
from mlx_distill.pipeline import STEPS, walk
from mlx_distill.records import Generation, Verdict
from mlx_distill.report import charts
from mlx_distill.report import run as reporting
from mlx_distill.run_records import RunRecord
from mlx_distill.training import run as training
from mlx_distill.training.run import train
from tests.tiny import make_tiny_model
from tests.walking import ALL, HELD_OUT, PROMPTS, Listener, done, make_project, recipe, snapshot

DATA, RUN, COMPARISON = Path("data/small"), Path("adapters/small"), Path("visuals/small")


@pytest.fixture(scope="module")
def walked_once(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A project that was walked to its end. Do not write into it."""
    folder = make_project(tmp_path_factory.mktemp("walked") / "project", tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert done() == list(ALL)
    return folder


@pytest.fixture
def plain_charts(walked_once: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts that take no time to draw; `walked_once` has real ones."""
    for name in reporting.CHARTS:
        monkeypatch.setattr(charts, name, lambda path, **_evidence: path.write_bytes(b"chart"))


@pytest.fixture
def walked(walked_once: Path, plain_charts: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, and the current folder."""
    shutil.copytree(walked_once, tmp_path / "project")
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


@pytest.fixture
def fresh(plain_charts: None, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project that was not walked, and the current folder."""
    monkeypatch.chdir(make_project(tmp_path / "project", tiny_model))
    return tmp_path / "project"


def edit(path: str, old: str, new: str) -> None:
    text = Path(path).read_text(encoding="utf-8")
    assert text.count(old) == 1
    Path(path).write_text(text.replace(old, new), encoding="utf-8")


# A whole walk.


def test_every_step_leaves_what_it_promises(walked: Path) -> None:
    manifest = layout.read_record(layout.DataFolder(DATA).manifest, Manifest)
    assert (manifest.prompts, manifest.answered, sum(manifest.rows.values())) == (PROMPTS, PROMPTS, PROMPTS)
    run = layout.read_record(layout.RunFolder(RUN).record, RunRecord)
    assert run.status == "finished"
    assert run.valid_loss is not None and run.first_valid_loss is not None
    assert run.valid_loss < run.first_valid_loss
    folder = layout.ComparisonFolder(COMPARISON)
    rows = layout.read_rows(folder.generations, Generation)
    assert sorted((row.contender, row.prompt.text) for row in rows) == sorted(
        (contender, text) for contender in ("teacher", "base", "distilled") for text in HELD_OUT
    )
    assert len(layout.read_rows(folder.verdicts, Verdict)) == len(rows)
    for path in (RUN / "adapters.safetensors", RUN / "fused" / "model.safetensors", folder.report, folder.results):
        assert path.stat().st_size > 0
    assert {path.stem for path in COMPARISON.glob("*.png")} >= {"training_curves", "model_scorecard"}


def test_a_second_walk_skips_every_step_and_touches_nothing(walked: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in walked.rglob("*") if path.name != ".lock"}
    listener = Listener()
    assert done(progress=listener) == []
    assert listener.said == [f"{step}: unchanged, skipped." for step in ALL]
    assert {path: path.stat().st_mtime_ns for path in walked.rglob("*") if path.name != ".lock"} == before


def test_touching_files_changes_nothing(walked: Path) -> None:
    for path in walked.rglob("*"):
        if path.is_file():
            os.utime(path, (0, 0))
    assert done() == []


def test_the_command_tells_how_it_went(walked: Path) -> None:
    result = CliRunner().invoke(main, ["run", "recipe.toml", "--json"])
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert [(step["step"], step["status"]) for step in data["steps"]] == [(step, "unchanged") for step in ALL]
    assert data["recipe"] == "small"
    assert data["adapter"] == "adapters/small/adapters.safetensors"
    assert data["report"] == "visuals/small/report.html"
    assert data["valid_loss"] < data["first_valid_loss"]
    assert data["scores"].keys() == {"teacher", "base", "distilled"}
    plain = CliRunner().invoke(main, ["run", "recipe.toml"])
    assert plain.stdout.startswith("prompts  unchanged")
    assert "rubric, 0 to 10" in plain.stdout


# What runs again.


def test_a_changed_prompt_runs_all_that_learns_from_it(walked: Path) -> None:
    edit("prompts.txt", "function number 3.", "function number 33.")
    with Path("answers.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "Write function number 33.", "answer": "def f33(): ..."}\n')
    assert done() == list(ALL)
    assert done() == []


def test_a_prompt_file_written_otherwise_changes_nothing_behind_it(walked: Path) -> None:
    with Path("prompts.txt").open("a", encoding="utf-8") as file:
        file.write("\n\n")
    assert done() == ["prompts"]


def test_a_changed_answer_of_the_teacher_is_collected_again(walked: Path) -> None:
    edit("answers.jsonl", "return 0", "return 1 - 1")
    ran = done()
    assert {"collect", "train", "fuse", "compare"} <= set(ran)
    assert "prompts" not in ran
    rows = "".join(layout.DataFolder(DATA).split(split).read_text(encoding="utf-8") for split in layout.SPLITS)
    assert "return 1 - 1" in rows


def test_another_held_out_prompt_trains_nothing(walked: Path) -> None:
    with Path("held.txt").open("a", encoding="utf-8") as file:
        file.write("Write function number 1.\n")
    before = snapshot("adapters")
    assert done() == ["compare", "judge", "report"]
    assert snapshot("adapters") == before
    rows = layout.read_rows(layout.ComparisonFolder(COMPARISON).generations, Generation)
    assert len(rows) == 3 * (len(HELD_OUT) + 1)


@pytest.mark.parametrize(
    ("override", "steps"),
    [
        ("prompts.modifiers=false", ["prompts"]),
        # It asks nothing again, and makes the same data set.
        ("collect.concurrency=1", ["collect"]),
        ("train.epochs=2", ["train", "fuse", "compare", "judge", "report"]),
        # It does not decide the result: the run is finished already.
        ("train.checkpoint_every=7", ["train"]),
        ("compare.batch_size=1", ["compare", "report"]),
        ("compare.max_tokens=3", ["compare", "judge", "report"]),
        ("judge.concurrency=1", ["judge"]),
    ],
)
def test_a_changed_key_runs_what_depends_on_it(walked: Path, override: str, steps: list[str]) -> None:
    assert done(override) == steps
    assert done(override) == []


@pytest.mark.parametrize(
    ("module", "steps"),
    [
        (prompts, ["prompts"]),
        (collecting, ["collect"]),
        (training, ["train", "fuse"]),
        (fuse, ["fuse"]),
        (compare, ["compare", "report"]),
        (judging, ["judge"]),
        (reporting, ["report"]),
    ],
    ids=ALL,
)
def test_a_changed_format_of_the_code_runs_its_step(
    walked: Path, monkeypatch: pytest.MonkeyPatch, module: Any, steps: list[str]
) -> None:
    monkeypatch.setattr(module, "CODE_FORMAT", 99)
    ran = done()
    assert ran[: len(steps)] == steps
    assert set(ran) - set(steps) <= {"report"}  # which tells when each was made
    assert done() == []


def test_another_base_model_under_the_same_name_is_trained_again(walked: Path, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", seed=1)
    override = f"train.model={json.dumps(str(model))}"
    assert done(override)[:2] == ["train", "fuse"]
    assert done(override) == []
    other = make_tiny_model(tmp_path / "model", seed=2)
    assert fingerprint(other) == fingerprint(model)
    assert done(override)[:2] == ["train", "fuse"]


@pytest.mark.parametrize(
    ("lost", "steps"),
    [
        ("data/small/prompts.jsonl", {"prompts"}),
        ("data/small/manifest.json", {"collect"}),
        ("data/small/train.jsonl", {"collect"}),
        ("data/small/valid.jsonl", {"collect"}),
        ("data/small/test.jsonl", {"collect"}),
        ("adapters/small/fused/model.safetensors", {"fuse"}),
        ("adapters/small/fused/mlx_distill_fused.json", {"fuse"}),
        ("visuals/small/generations.jsonl", {"compare"}),
        ("visuals/small/verdicts.jsonl", {"judge"}),
        ("visuals/small/report.html", {"report"}),
        ("visuals/small/training_curves.png", {"report"}),
    ],
)
def test_what_is_lost_is_made_again(walked: Path, lost: str, steps: set[str]) -> None:
    if lost.endswith("mlx_distill_fused.json"):
        shutil.rmtree("adapters/small/fused")  # Without its record the folder would not be ours to replace.
    else:
        Path(lost).unlink()
    ran = set(done())
    assert steps <= ran
    assert "train" not in ran
    assert Path(lost).exists()
    assert done() == []


def test_a_file_changed_by_hand_is_noticed(walked: Path) -> None:
    path = layout.DataFolder(DATA).split("valid")
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"return", b"retvrn"))  # of the same size
    assert done() == ["collect"]
    assert path.read_bytes() == whole


# Forced.


def aside() -> dict[str, bytes]:
    """What lies in results that were moved aside, by the name it had."""
    found: dict[str, bytes] = {}
    for path in sorted(Path().rglob("*.before-1*")):
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        found |= {str(file).replace(".before-1", ""): file.read_bytes() for file in files}
    return {name: content for name, content in found.items() if not name.endswith(".lock")}


@pytest.mark.parametrize(
    ("step", "results"),
    [
        ("train", lambda path: path.startswith("adapters/small/")),
        ("compare", lambda path: path == "visuals/small/generations.jsonl"),
        ("judge", lambda path: path == "visuals/small/verdicts.jsonl"),
    ],
)
def test_force_moves_the_old_result_aside(walked: Path, step: str, results: Callable[[str], bool]) -> None:
    before = {name: content for name, content in snapshot("adapters", "visuals").items() if results(name)}
    before = {name: content for name, content in before.items() if not name.endswith(".lock")}
    listener = Listener()
    ran = done(force=(step,), progress=listener)
    assert step in ran
    assert aside() == before
    assert any("moved aside" in line and ".before-1" in line for line in listener.said)
    assert done() == []


@pytest.mark.parametrize("step", ["prompts", "collect", "fuse", "report"])
def test_force_makes_what_follows_from_its_inputs_again(walked: Path, step: str) -> None:
    before = {name: content for name, content in snapshot("data", "adapters").items() if ".lock" not in name}
    assert done(force=(step,)) in ([step], [step, "report"])
    after = {name: content for name, content in snapshot("data", "adapters").items() if ".lock" not in name}
    assert {name for name in before if before[name] != after[name]} <= {
        name for name in before if ".steps/" in name or "ledger.db" in name
    }
    assert before.keys() <= after.keys()


def test_force_is_repeatable_and_loses_nothing(walked: Path) -> None:
    first = Path("visuals/small/verdicts.jsonl").read_bytes()
    for _ in range(3):
        done(force=("judge",))
    kept = sorted(path.name for path in COMPARISON.glob("verdicts.jsonl*"))
    assert kept == ["verdicts.jsonl", *(f"verdicts.jsonl.before-{n}" for n in (1, 2, 3))]
    assert all((COMPARISON / name).read_bytes() == first for name in kept)


def test_a_forced_step_of_a_fresh_project_is_just_a_step(fresh: Path) -> None:
    assert done(force=("train", "judge")) == list(ALL)
    assert list(Path().rglob("*.before-*")) == []


def test_a_forced_step_must_exist(fresh: Path) -> None:
    with pytest.raises(ConfigError, match="--force trian: there is no such step") as caught:
        walk(recipe(), force=["trian"])
    assert caught.value.hint == f"Steps: {', '.join(STEPS)}."
    assert not DATA.exists()


def test_a_result_in_use_is_not_moved(walked: Path) -> None:
    with layout.lock(RUN), pytest.raises(FolderError, match="in use by process"):
        done(force=("train",))
    assert list(Path().rglob("*.before-*")) == []
    assert done() == []


# Results that someone else made, and failures.


def test_a_run_of_other_inputs_that_a_walk_made_is_kept_aside(walked: Path) -> None:
    before = {name: content for name, content in snapshot("adapters").items() if not name.endswith(".lock")}
    listener = Listener()
    assert "train" in done("train.rank=1", progress=listener)
    assert aside() == before
    assert any("Different: rank 2 → 1" in line for line in listener.said)


def test_a_run_made_by_hand_is_not_moved(fresh: Path) -> None:
    config = recipe("train.rank=1").train.model_copy(update={"data": fresh / "own"})
    (fresh / "own").mkdir()
    (fresh / "own" / "train.jsonl").write_text('{"text": "def f(): return 1"}\n' * 2, encoding="utf-8")
    train(config)
    before = snapshot("adapters")
    with pytest.raises(OccupiedError, match="holds another run") as caught:
        done()
    assert caught.value.hint == "Move it aside:  --force train     Or keep both:  --set name=OTHER"
    assert snapshot("adapters") == before
    assert "train" in done(force=("train",))


def test_a_failing_step_leaves_those_before_it(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any) -> Any:
        raise InputError("it failed.", path="x")

    with monkeypatch.context() as patch, pytest.raises(InputError, match="it failed"):
        patch.setattr(training, "load_splits", fail)
        patch.setattr(training, "train", fail)
        done()
    listener = Listener()
    assert done(progress=listener) == ["train", "fuse", "compare", "judge", "report"]
    assert listener.said[:2] == ["prompts: unchanged, skipped.", "collect: unchanged, skipped."]


def test_a_prompt_without_an_answer_stops_before_training(fresh: Path) -> None:
    with Path("prompts.txt").open("a", encoding="utf-8") as file:
        file.write("Nobody has answered this.\n")
    with pytest.raises(TeacherError, match="1 of 15 prompts failed"):
        done()
    assert not RUN.exists()
    with Path("answers.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "Nobody has answered this.", "answer": "Now someone has."}\n')
    assert done()[:2] == ["collect", "train"]


def test_a_dry_run_collects_nothing(fresh: Path) -> None:
    with pytest.raises(ConfigError, match="dry run"):
        done("collect.dry_run=true")
    assert not (DATA / "train.jsonl").exists()
    assert not RUN.exists()


@pytest.mark.parametrize("damage", ["", "{", '{"format": 2}', "\x00\xff", None])
def test_a_damaged_stamp_is_no_stamp(walked: Path, damage: str | None) -> None:
    path = layout.stamp(COMPARISON, "judge")
    path.unlink()
    if damage is None:
        path.mkdir()
        with pytest.raises(FolderError, match=r"judge\.json exists and is not a file"):
            done()
        return
    path.write_bytes(damage.encode("latin-1"))
    assert done() == ["judge"]
    assert done() == []


def test_two_walks_of_one_recipe_do_not_meet(fresh: Path) -> None:
    with layout.lock(DATA / ".steps"), pytest.raises(FolderError, match="in use by process"):
        done()
    assert not (DATA / "prompts.jsonl").exists()


def test_names_keep_walks_apart(walked: Path) -> None:
    before = snapshot("data/small", "adapters/small", "visuals/small")
    assert done("name=other", "judge.concurrency=1") == list(ALL)
    assert snapshot("data/small", "adapters/small", "visuals/small") == before
    assert (Path("adapters/other/adapters.safetensors")).read_bytes() == before["adapters/small/adapters.safetensors"]
    assert done() == []
