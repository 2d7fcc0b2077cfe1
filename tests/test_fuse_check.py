"""The gate after fusing: it passes what is right, catches what is wrong, and tells the price of quantizing again."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_distill import layout
from mlx_distill.backends.mlx import fusing
from mlx_distill.cli.main import main
from mlx_distill.config import FuseConfig
from mlx_distill.errors import InputError, MlxDistillError, ModelError, ResourceError
from mlx_distill.fuse import TOLERANCES, fuse
from mlx_distill.layout import RunFolder, fused_record, read_record
from mlx_distill.run_records import FuseCheck
from mlx_distill.runs import FusedRecord, read_run
from tests.fusing import fused_files, left_behind, store_as, trained
from tests.tiny import make_tiny_model
from tests.training.runs import Recorder, make_data
from tests.walking import ALL, done, make_project

#: A matrix that the adapters of these tests change.
CHANGED = "model.layers.3.mlp.up_proj"

Weights = dict[str, mx.array]


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Path:
    return trained(tmp_path, tiny_model)


def base_of(folder: Path, dtype: str) -> Path:
    model = make_tiny_model(folder)
    return model if dtype == "float32" else store_as(model, dtype)


def checked(record: FusedRecord) -> FuseCheck:
    assert record.check is not None
    return record.check


# What is right.


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_right_passes_and_its_figures_are_kept(tmp_path: Path, dtype: str, kind: str) -> None:
    run = trained(tmp_path, base_of(tmp_path / "base", dtype), adapter=kind)
    before = read_run(run)
    record = fuse(FuseConfig(run=run))
    check = checked(record)
    assert (check.way, check.dtype, check.passed, check.refused) == ("plain", dtype, True, None)
    assert (check.source, check.rows, check.agreement.answers) == ("test", 2, 2)
    limit = TOLERANCES[dtype]
    assert (check.tolerance_kl, check.tolerance_loss) == (limit.kl, limit.loss)
    # An order of magnitude from where it would fail.
    assert check.agreement.kl < limit.kl / 10
    assert abs(check.agreement.loss - check.agreement.loss_reference) < limit.loss / 10
    # All of the test split is read, by base and adapter as training read it.
    assert check.agreement.positions == before.splits["test"].target_tokens
    assert before.test_loss is not None
    assert check.agreement.loss_reference == pytest.approx(before.test_loss, abs=1e-5)
    after = read_run(run)
    assert after.fusing == check
    assert after.model_copy(update={"fusing": None}) == before
    assert read_record(fused_record(run / "fused"), FusedRecord) == record


def test_fusing_again_writes_no_record_anew(run: Path) -> None:
    fuse(FuseConfig(run=run))
    record = RunFolder(run).record
    before = record.stat()
    fuse(FuseConfig(run=run))
    assert (record.stat().st_ino, record.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_the_command_tells_the_figures(run: Path) -> None:
    result = CliRunner().invoke(main, ["fuse", str(run)])
    assert result.exit_code == 0, result.stderr
    assert "it says what base and adapter say (2 held-out rows of test.jsonl)" in result.stdout
    assert "KL " in result.stdout
    assert "greedy tokens alike" in result.stdout
    result = CliRunner().invoke(main, ["fuse", str(run), "--json"])
    assert FuseCheck.model_validate(json.loads(result.stdout)["check"]) == read_run(run).fusing


# What is wrong: one matrix of one layer, as it lies on the disk.


def _row_lost(weights: Weights, name: str) -> None:
    value = np.array(weights[name].astype(mx.float32))
    value[5] = 0
    weights[name] = mx.array(value).astype(weights[name].dtype)


def _rows_swapped(weights: Weights, name: str) -> None:
    value = np.array(weights[name].astype(mx.float32))
    value[[3, 4]] = value[[4, 3]]
    weights[name] = mx.array(value).astype(weights[name].dtype)


def _set(change: Callable[[mx.array], mx.array]) -> Callable[[Weights, str], None]:
    def apply(weights: Weights, name: str) -> None:
        weights[name] = change(weights[name]).astype(weights[name].dtype)

    return apply


CORRUPTIONS: dict[str, Callable[[Weights, str], None]] = {
    "zeroed": _set(mx.zeros_like),
    "negated": _set(lambda value: -value),
    "scaled": _set(lambda value: 1.1 * value),
    "shifted": _set(lambda value: mx.roll(value, 1, axis=1)),
    "row lost": _row_lost,
    "rows swapped": _rows_swapped,
    "no number": _set(lambda value: value * math.nan),
    "one infinite": _set(lambda value: mx.where(mx.arange(value.size).reshape(value.shape) == 7, math.inf, value)),
}


def corrupting(monkeypatch: pytest.MonkeyPatch, name: str, corrupt: Callable[[Weights, str], None]) -> None:
    """From now on one tensor is wrong on the disk after each fusing."""
    real = fusing.fuse_into

    def wrong(base: Path, adapter: Path, out: Path, **options: Any) -> fusing.Fused:
        fused = real(base, adapter, out, **options)
        weights = mx.load(str(out / "model.safetensors"))
        assert isinstance(weights, dict)
        corrupt(weights, name)
        mx.eval(weights)
        mx.save_safetensors(str(out / "model.safetensors"), weights)
        return fused

    monkeypatch.setattr(fusing, "fuse_into", wrong)


#: What the rounding of a type can hide.
HIDDEN = {"float32": (), "float16": ("row lost",), "bfloat16": ("scaled", "row lost", "rows swapped")}


@pytest.mark.parametrize(
    ("dtype", "corruption"),
    [(dtype, name) for dtype, hidden in HIDDEN.items() for name in CORRUPTIONS if name not in hidden],
)
def test_a_corrupt_layer_is_caught_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, corruption: str
) -> None:
    run = trained(tmp_path, base_of(tmp_path / "base", dtype), epochs=1)
    record = RunFolder(run).record.read_bytes()
    corrupting(monkeypatch, f"{CHANGED}.weight", CORRUPTIONS[corruption])
    with pytest.raises(ModelError, match=r"no numbers|does not say") as caught:
        fuse(FuseConfig(run=run))
    if "number" not in str(caught.value):
        assert "KL " in caught.value.message
        assert f"at most {TOLERANCES[dtype].kl:g}" in caught.value.message
    assert not (run / "fused").exists()
    assert left_behind(run) == []
    assert RunFolder(run).record.read_bytes() == record


def test_the_earlier_model_stays_where_the_new_one_is_wrong(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fuse(FuseConfig(run=run))
    before, record = fused_files(run / "fused"), RunFolder(run).record.read_bytes()
    corrupting(monkeypatch, f"{CHANGED}.weight", CORRUPTIONS["rows swapped"])
    with pytest.raises(ModelError, match="does not say"):
        fuse(FuseConfig(run=run))
    assert fused_files(run / "fused") == before
    assert RunFolder(run).record.read_bytes() == record
    assert left_behind(run) == []


def test_a_layer_that_the_adapter_does_not_change_is_looked_at_as_well(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corrupting(monkeypatch, "model.layers.0.self_attn.v_proj.weight", CORRUPTIONS["rows swapped"])
    with pytest.raises(ModelError, match="does not say"):
        fuse(FuseConfig(run=run))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.9, 1.1, 2.0])
def test_a_wrong_scale_is_caught(run: Path, monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """What goes wrong in memory: less or more of the adapter than there is."""
    real = fusing._merged

    def wrong(module: Any, base: Any, name: str | None) -> mx.array:
        module.scale *= share
        return real(module, base, name)

    monkeypatch.setattr(fusing, "_merged", wrong)
    with pytest.raises(ModelError, match="does not say"):
        fuse(FuseConfig(run=run))
    assert not (run / "fused").exists()


def test_an_adapter_of_no_numbers_is_refused(run: Path) -> None:
    files = RunFolder(run)
    weights = mx.load(str(files.adapter))
    assert isinstance(weights, dict)
    weights[f"{CHANGED}.lora_b"] *= math.nan
    mx.eval(weights)
    mx.save_safetensors(str(files.adapter), weights)
    with pytest.raises(ModelError, match="no numbers"):
        fuse(FuseConfig(run=run))
    assert not (run / "fused").exists()
    assert left_behind(run) == []


# Which rows are read.


def test_rows_of_another_data_set_are_read_where_it_is_named(run: Path, tmp_path: Path) -> None:
    own = checked(fuse(FuseConfig(run=run)))
    other = make_data(tmp_path / "other", train=0, valid=5, test=0)
    check = checked(fuse(FuseConfig(run=run, data=other)))
    assert (check.source, check.rows, check.passed) == ("valid", 5, True)
    assert check.agreement.loss_reference != own.agreement.loss_reference
    assert read_run(run).fusing == check


@pytest.mark.parametrize("name", ["gone", "empty"])
def test_a_data_set_that_is_named_and_not_there_is_refused(run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="there is no data set"):
        fuse(FuseConfig(run=run, data=tmp_path / name))
    assert not (run / "fused").exists()


def test_prompts_of_our_own_are_read_where_the_runs_data_is_gone(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "data")
    listener = Recorder()
    check = checked(fuse(FuseConfig(run=run), listener))
    assert (check.source, check.passed) == ("prompts", True)
    assert any("prompts of our own" in line for line in listener.said)


# Bad input: refused with the reason, and nothing is left.


def _edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        settings = json.loads(path.read_text(encoding="utf-8"))
        change(settings)
        path.write_text(json.dumps(settings), encoding="utf-8")

    return apply


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (Path.unlink, "no such file"),
        (lambda path: path.write_text("{", encoding="utf-8"), "Invalid JSON"),
        (lambda path: path.write_text("[]", encoding="utf-8"), "should be an object"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "utf-8"),
        (_edit(lambda it: it.pop("num_layers")), "num_layers"),
        (_edit(lambda it: it.update(num_layers=99)), "it lacks 28 of the 56 tensors"),
        (_edit(lambda it: it.update(fine_tune_type="full")), "fine_tune_type"),
        (_edit(lambda it: it.update(fine_tune_type="dora")), "it lacks 14 of the 42 tensors"),
        (_edit(lambda it: it.update(lora_parameters=None)), "lora_parameters"),
        (_edit(lambda it: it["lora_parameters"].pop("scale")), "lora_parameters.scale"),
        (_edit(lambda it: it["lora_parameters"].update(rank=0)), "lora_parameters.rank"),
        (_edit(lambda it: it["lora_parameters"].update(rank=8)), "is of rank 4, and adapter_config.json says 8"),
        (_edit(lambda it: it["lora_parameters"].update(keys=5)), "lora_parameters.keys"),
        (_edit(lambda it: it["lora_parameters"].update(keys=["mlp.up_proj"])), "does not load"),
        (_edit(lambda it: it["lora_parameters"].update(scale=math.nan)), "no numbers"),
    ],
)
def test_a_damaged_adapter_config_is_refused(run: Path, damage: Callable[[Path], Any], reason: str) -> None:
    damage(RunFolder(run).adapter_config)
    with pytest.raises(MlxDistillError, match=reason):
        fuse(FuseConfig(run=run))
    assert not (run / "fused").exists()
    assert left_behind(run) == []
    assert read_run(run).fusing is None


def test_an_adapter_of_another_base_is_refused(tmp_path: Path, run: Path) -> None:
    other = trained(tmp_path / "other", make_tiny_model(tmp_path / "wide", hidden=96))
    shutil.copy(RunFolder(other).adapter, RunFolder(run).adapter)
    with pytest.raises(ModelError, match="does not load onto the model"):
        fuse(FuseConfig(run=run))
    assert not (run / "fused").exists()
    assert left_behind(run) == []


def test_an_adapter_without_weights_is_refused(run: Path) -> None:
    mx.save_safetensors(str(RunFolder(run).adapter), {})
    with pytest.raises(ModelError, match="holds no weights"):
        fuse(FuseConfig(run=run))
    assert left_behind(run) == []


# The run's record is written last, and a walk does not take it for another training.


def test_a_record_that_cannot_be_written_is_written_by_the_next_call(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = fuse(FuseConfig(run=run))
    files = RunFolder(run)
    before = files.record.read_text(encoding="utf-8")
    files.record.write_text(
        read_run(run).model_copy(update={"fusing": None}).model_dump_json(indent=2, exclude_none=True) + "\n",
        encoding="utf-8",
    )
    real = layout.write_text

    def full(path: Path, text: str) -> None:
        if path == files.record:
            raise ResourceError(f"{path} could not be written: No space left on device.")
        real(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(layout, "write_text", full)
        with pytest.raises(ResourceError, match=r"run\.json could not be written"):
            fuse(FuseConfig(run=run))
    assert read_run(run).fusing is None
    assert read_record(fused_record(run / "fused"), FusedRecord) == expected
    assert fuse(FuseConfig(run=run)) == expected
    assert files.record.read_text(encoding="utf-8") == before


@pytest.mark.slow
def test_a_walk_fuses_again_without_training_again(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_project(tmp_path / "project", tiny_model))
    assert done() == list(ALL)
    assert done() == []
    run = Path("adapters/small")
    first = read_run(run).fusing
    assert done("fuse.quantized_base=requantize") == ["fuse"]
    make_data(Path("data/other"))
    assert "train" not in (ran := done("fuse.data=data/other"))
    assert ran[0] == "fuse"
    assert read_run(run).fusing != first
    assert done("fuse.data=data/other") == []
    # Other rows are another check.
    make_data(Path("data/other"), test=3)
    assert done("fuse.data=data/other")[0] == "fuse"
    # By hand, between two walks.
    fuse(FuseConfig(run=run))
    assert "train" not in done()
    assert read_run(run).fusing == first
    # All else in the record decides.
    record = RunFolder(run).record
    record.write_text(record.read_text(encoding="utf-8").replace('"steps": ', '"steps": 1'), encoding="utf-8")
    assert done()[0] == "train"
