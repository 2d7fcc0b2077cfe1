"""PEFT's format: it loads, says the same, and comes back to the bit."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings, strategies
from safetensors import safe_open
from safetensors.numpy import save_file

from mlx_distill import layout
from mlx_distill.config import ImportAdapterConfig
from mlx_distill.errors import InputError, ModelError
from mlx_distill.export import peft
from mlx_distill.export.import_adapter import import_adapter
from mlx_distill.export.run import export
from mlx_distill.layout import RunFolder
from mlx_distill.records import ModelRecord
from tests.export.exporting import adapter, asked, description, left_over, quantize, random_run, trained
from tests.tiny import make_tiny_model

SCALES = strategies.floats(1e-3, 1e3)


@given(scale=SCALES, rank=strategies.integers(1, 512), rslora=strategies.booleans())
def test_a_scale_comes_back_to_the_bit(scale: float, rank: int, rslora: bool) -> None:
    alpha = peft.alpha_of(scale, rank, rslora=rslora)
    stated = peft.scale_of(alpha, rank, rslora=rslora)
    assert abs(stated - scale) <= 2 * math.ulp(scale)
    assert peft.exact_scale(stated, {peft.SCALE_KEY: scale.hex()}) == scale


def test_alpha_is_what_a_person_would_write() -> None:
    assert [peft.alpha_of(2.0, 8, rslora=False), peft.alpha_of(0.5, 4, rslora=False)] == [16, 2]
    assert peft.alpha_of(2.0 * math.sqrt(8), 8, rslora=True) == pytest.approx(16, rel=1e-15)
    assert isinstance(peft.alpha_of(2.0, 8, rslora=False), int)


@pytest.mark.parametrize("kept", ["", "nan", "inf", "1.5", "0x1.8p9999", (2.0).hex()])
def test_an_alpha_that_was_changed_since_holds(kept: str) -> None:
    assert peft.exact_scale(3.0, {peft.SCALE_KEY: kept}) == 3.0


@settings(max_examples=30, deadline=None)
@given(data=strategies.data())
def test_the_round_trip_is_bit_exact(data: strategies.DataObject) -> None:
    """Of any rank, scale, kind, layers and targets, on tied and untied models: tensors and settings."""
    draw = data.draw
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        architecture: Any = draw(strategies.sampled_from(["qwen2", "llama"]))
        model = make_tiny_model(folder / "model", architecture=architecture, tied=draw(strategies.booleans()), layers=2)
        run = random_run(
            folder / "run",
            model,
            rank=draw(strategies.integers(1, 32)),
            scale=draw(SCALES),
            dora=draw(strategies.booleans()),
            rslora=draw(strategies.booleans()),
            dropout=draw(strategies.sampled_from([0.0, 0.05, 1 / 3])),
            layers=draw(strategies.integers(1, 2)),
            keys=draw(strategies.sampled_from([None, ["self_attn.q_proj"], ["mlp.down_proj", "self_attn.v_proj"]])),
        )
        export(asked(run, "peft", verify=False))
        import_adapter(ImportAdapterConfig(source=run / "export" / "peft", run=folder / "back", model=str(model)))
        before, after = adapter(run), adapter(folder / "back")
        assert before.keys() == after.keys()
        for key, value in before.items():
            assert value.dtype == after[key].dtype
            assert value.tobytes() == after[key].tobytes()
        assert description(folder / "back") == description(run)


@pytest.mark.parametrize(
    ("architecture", "tied", "changes"),
    [
        ("llama", True, {"rslora": True, "targets": "q_proj,down_proj", "rank": 3, "scale": 0.7}),
        pytest.param("qwen2", False, {"adapter": "dora", "layers": "all", "dropout": 0.1}, marks=pytest.mark.slow),
    ],
    ids=["rslora", "dora"],
)
def test_peft_says_what_the_student_says(
    tmp_path: Path, architecture: Any, tied: bool, changes: dict[str, Any]
) -> None:
    model = make_tiny_model(tmp_path / "model", architecture=architecture, tied=tied)
    run = trained(tmp_path, model, **changes)
    record = export(asked(run, "peft"))
    assert record.agreement is not None
    assert record.consumer is not None and record.consumer.startswith("peft ")
    assert record.agreement.kl < 1e-9
    assert (record.agreement.same_choice, record.agreement.greedy_agreement) == (1, 1)
    out = RunFolder(run).export("peft")
    assert left_over(out) == ["adapter_config.json", "adapter_model.safetensors", "mlx_distill_export.json"]
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["use_rslora"], config["use_dora"]) == ("rslora" in changes, "adapter" in changes)
    assert len(config["target_modules"]) == (4 if "targets" in changes else 28)
    assert {name: layout.file_sha256(out / name) for name in record.files} == record.files


@pytest.mark.slow
def test_an_adapter_of_a_quantized_base_is_checked_on_that_base(tmp_path: Path) -> None:
    model = quantize(make_tiny_model(tmp_path / "model"), 4)
    record = export(asked(trained(tmp_path, model), "peft"))
    assert record.agreement is not None
    assert record.agreement.kl < 1e-9
    assert "quantized for MLX" in record.notes[0]
    assert not left_over(tmp_path / "run" / "export" / "peft" / ".work")


@pytest.mark.slow
def test_what_says_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale that is a tenth too large."""
    run = trained(tmp_path, make_tiny_model(tmp_path / "model"))
    before = left_over(tmp_path)
    right = peft.alpha_of
    monkeypatch.setattr(peft, "alpha_of", lambda scale, rank, *, rslora: 1.1 * right(scale, rank, rslora=rslora))
    with pytest.raises(ModelError, match="does not say what the student says"):
        export(asked(run, "peft"))
    assert left_over(tmp_path) == before
    assert not (run / "export").exists()


@pytest.mark.parametrize(
    ("source", "spec", "name"),
    [
        ("hub", "org/name@main", ("org/name", "c" * 40)),
        ("hub", "smollm2-135m", ("HuggingFaceTB/SmolLM2-135M-Instruct", "c" * 40)),
        ("bundled", "smollm2-135m", ("HuggingFaceTB/SmolLM2-135M-Instruct", None)),
        ("gguf", "/home/me/models/a.gguf", ("a.gguf", None)),
        ("folder", "models/a", ("models/a", None)),
    ],
)
def test_the_base_is_named_so_that_others_find_it(source: Any, spec: str, name: tuple[str, str | None]) -> None:
    model = ModelRecord(spec=spec, source=source, path="/home/me/cache/a", name="a", revision="c" * 40)
    assert peft.base_name(model) == name


def _cut(run: Path) -> None:
    path = RunFolder(run).adapter
    path.write_bytes(path.read_bytes()[:-5])


def _pickle(run: Path) -> None:
    RunFolder(run).adapter.write_bytes(b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins\x94.")


def _change(run: Path, **changes: Any) -> None:
    tensors = {**adapter(run), **changes}
    save_file({k: v for k, v in tensors.items() if v is not None}, RunFolder(run).adapter)


def _describe(run: Path, **changes: Any) -> None:
    found = description(run)
    found["lora_parameters"] |= changes
    RunFolder(run).adapter_config.write_text(json.dumps(found), encoding="utf-8")


Q = "model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_cut, "not a whole safetensors file"),
        (_pickle, "not a whole safetensors file"),
        (lambda run: RunFolder(run).adapter_config.unlink(), "no such file"),
        (lambda run: RunFolder(run).adapter_config.write_text("[]"), "no configuration of an adapter"),
        (lambda run: _describe(run, rank=5), "ranks 4 and 4, and its configuration says 5"),
        (lambda run: _describe(run, scale=math.nan), "cannot be"),
        (lambda run: _change(run, **{f"{Q}.lora_b": None}), "has lora_a, where lora_a, lora_b are needed"),
        (lambda run: _change(run, **{f"{Q}.lora_a.0": np.zeros((64, 4), np.float32)}), "several in one"),
        (lambda run: _change(run, **{f"{Q}.lora_a": np.zeros((2, 4, 64), np.float32)}), "no single matrix"),
        (lambda run: _change(run, **{f"{Q}.lora_a": np.full((64, 4), np.nan, np.float32)}), "no numbers"),
        (lambda run: _change(run, **{f"{Q}.lora_a": np.zeros((32, 4), np.float32)}), "does not load onto the model"),
    ],
)
def test_a_damaged_adapter_is_refused(tmp_path: Path, tiny_model: Path, damage: Any, reason: str) -> None:
    run = random_run(tmp_path / "run", tiny_model, rank=4, layers=3)
    damage(run)
    before = left_over(tmp_path)
    with pytest.raises((InputError, ModelError), match=reason):
        export(asked(run, "peft", verify=False))
    assert left_over(tmp_path) == before
    assert not (run / "export").exists()


def test_a_base_that_is_not_what_it_was_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    run = random_run(tmp_path / "run", model, rank=4)
    make_tiny_model(model, seed=1)
    with pytest.raises(ModelError, match="is not what it was"):
        export(asked(run, "peft", verify=False))
    assert not (run / "export").exists()


def test_the_file_is_peft_s_own(tmp_path: Path, tiny_model: Path) -> None:
    """Names and orientation, number by number."""
    run = random_run(tmp_path / "run", tiny_model, rank=4, dora=True)
    export(asked(run, "peft", verify=False))
    ours = adapter(run)
    with safe_open(run / "export" / "peft" / "adapter_model.safetensors", framework="np") as file:
        assert file.metadata()["format"] == "pt"
        name = "base_model.model.model.layers.3.mlp.down_proj"
        np.testing.assert_array_equal(file.get_tensor(f"{name}.lora_A.weight").T, ours[f"{name[17:]}.lora_a"])
        np.testing.assert_array_equal(file.get_tensor(f"{name}.lora_B.weight").T, ours[f"{name[17:]}.lora_b"])
        np.testing.assert_array_equal(file.get_tensor(f"{name}.lora_magnitude_vector"), ours[f"{name[17:]}.m"])
        assert len(file.keys()) == len(ours)
