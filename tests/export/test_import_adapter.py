"""What PEFT wrote becomes a run that says the same; what mlx-lm does not compute is refused, and leaves no trace."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from mlx_distill import layout
from mlx_distill.agreement import Observation, Probe, ProbeRow, agreement
from mlx_distill.backends.mlx.observing import observe_folder as observe_on_mlx
from mlx_distill.backends.torch.observing import observe_folder as observe_on_torch
from mlx_distill.config import FuseConfig, ImportAdapterConfig
from mlx_distill.errors import InputError, MlxDistillError, ModelError, OccupiedError
from mlx_distill.export.import_adapter import import_adapter
from mlx_distill.export.run import export
from mlx_distill.fuse import fuse
from mlx_distill.layout import RunFolder
from mlx_distill.run_list import list_runs
from mlx_distill.runs import read_run
from tests.export.exporting import adapter, asked, description, left_over, random_run
from tests.tiny import make_tiny_model

PROBE = Probe(
    rows=(ProbeRow(tokens=(5, 17, 300, 42, 8, 250), positions=(0, 2, 3, 4)),),
    prompts=((5, 17, 300),),
    greedy_tokens=8,
)


def from_peft(folder: Path, model: Path, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """An adapter that PEFT itself made and saved, with random factors."""
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(base, LoraConfig(**values))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3)
        adapted.to(dtype).save_pretrained(folder, save_embedding_layers=False)
    return folder


def take(source: Path, run: Path, model: Path | None = None) -> Any:
    return import_adapter(ImportAdapterConfig(source=source, run=run, model=None if model is None else str(model)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "filled"),
    [
        ({}, 0),
        ({"use_rslora": True, "r": 3, "lora_alpha": 5}, 0),
        ({"use_dora": True, "layers_to_transform": [1, 3]}, 2),
        ({"layers_to_transform": [2]}, 2),
        ({"target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.3.mlp.up_proj"]}, 4),
        ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 8}}, 0),
    ],
    ids=["lora", "rslora", "dora-two-layers", "one-layer", "two-matrices", "uniform-patterns"],
)
def test_the_run_says_what_peft_says(tmp_path: Path, settings: dict[str, Any], filled: int) -> None:
    model = make_tiny_model(tmp_path / "model")
    source = from_peft(tmp_path / "theirs", model, **settings)
    record = take(source, tmp_path / "run")
    assert (record.filled, record.kind) == (filled, "dora" if settings.get("use_dora") else "lora")
    observe_on_torch(model, source, PROBE, tmp_path / "a")
    observe_on_mlx(model, tmp_path / "run", PROBE, tmp_path / "b")
    observe_on_mlx(model, None, PROBE, tmp_path / "c")
    theirs, ours, base = (Observation.load(tmp_path / name) for name in "abc")
    assert agreement(PROBE, theirs, ours).kl < 1e-9
    assert theirs.greedy == ours.greedy
    assert agreement(PROBE, theirs, base).kl > 1e-4


def test_a_run_of_theirs_is_a_run(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    run = tmp_path / "run"
    take(from_peft(tmp_path / "theirs", model), run)
    assert left_over(run) == ["adapter_config.json", "adapters.safetensors", "run.json"]
    record = read_run(run)
    assert (record.backend, record.splits, record.config["rank"], record.config["scale"]) == ("peft", {}, 4, 2.0)
    assert "data" not in record.config and "learning_rate" not in record.config
    assert [entry.status for entry in list_runs(run)] == ["finished"]
    assert fuse(FuseConfig(run=run)).layers == 8
    export(asked(run, "peft", verify=False))
    again = tmp_path / "again"
    take(run / "export" / "peft", again)
    assert {k: v.tobytes() for k, v in adapter(again).items()} == {k: v.tobytes() for k, v in adapter(run).items()}
    assert description(again) == description(run)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_taken_to_the_bit(tmp_path: Path, tiny_model: Path, dtype: torch.dtype) -> None:
    source = from_peft(tmp_path / "theirs", tiny_model, dtype=dtype)
    take(source, tmp_path / "run", tiny_model)
    from safetensors.torch import load_file as load_torch

    theirs = load_torch(source / "adapter_model.safetensors")
    found = adapter(tmp_path / "run")
    name = "model.layers.3.self_attn.q_proj"
    assert theirs[f"base_model.model.{name}.lora_A.weight"].dtype == dtype
    expected: NDArray[Any] = theirs[f"base_model.model.{name}.lora_A.weight"].float().numpy().T
    np.testing.assert_array_equal(found[f"{name}.lora_a"], expected)


def test_the_same_adapter_again_changes_nothing(tmp_path: Path, tiny_model: Path) -> None:
    source = from_peft(tmp_path / "theirs", tiny_model)
    assert not take(source, tmp_path / "run").earlier
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}
    assert take(source, tmp_path / "run").earlier
    after = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.name != ".lock"}
    assert before == after
    other = from_peft(tmp_path / "other", tiny_model, lora_alpha=9)
    with pytest.raises(OccupiedError):
        take(other, tmp_path / "run")
    assert description(tmp_path / "run")["lora_parameters"]["scale"] == 2.0


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, tiny_model: Path) -> None:
    source = from_peft(tmp_path / "theirs", tiny_model)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear", encoding="utf-8")
    trained = random_run(tmp_path / "trained", tiny_model, rank=4)
    before = left_over(tmp_path)
    for run in (tmp_path / "mine", trained, tmp_path / "mine" / "diary.txt"):
        with pytest.raises(OccupiedError):
            take(source, run)
    assert left_over(tmp_path) == before


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "LOHA"}, "of type LOHA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "started with pissa_niter_4"),
        ({"r": 5}, "ranks 4 and 4, and its configuration says 5"),
        ({"r": 0}, "r: "),
        ({"r": "4"}, "r: "),
        ({"lora_alpha": -1}, "lora_alpha: "),
        ({"lora_dropout": 1.5}, "lora_dropout: "),
        ({"use_dora": True}, "lora_magnitude_vector|are needed"),
        ({"base_model_name_or_path": "../../etc"}, "climbs out of its folder"),
        ({"base_model_name_or_path": None}, "names no base model"),
        ({"base_model_name_or_path": "nowhere/to/be/found"}, "There is no model"),
    ],
)
def test_what_cannot_be_taken_is_refused(
    tmp_path: Path, tiny_model: Path, changes: dict[str, Any], reason: str
) -> None:
    source = from_peft(tmp_path / "theirs", tiny_model)
    path = source / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    before = left_over(tmp_path)
    with pytest.raises(MlxDistillError, match=reason):
        take(source, tmp_path / "run")
    assert left_over(tmp_path) == before
    assert not (tmp_path / "run").exists()


Q = "base_model.model.model.layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight", (4, 64), "are needed"),
        ("base_model.model.model.embed_tokens.lora_embedding_A", (4, 384), "has no name for"),
        ("base_model.model.lm_head.base_layer.weight", (384, 64), "has no name for"),
        ("../../evil.lora_A.weight", (4, 64), "has no name for"),
        (f"{Q}.lora_A.weight", (4, 32), "is an adapter for another model"),
        (f"{Q}.lora_A.weight", (4, 64, 1), "no single matrix"),
    ],
)
def test_tensors_that_do_not_belong_are_refused(
    tmp_path: Path, tiny_model: Path, name: str, shape: tuple[int, ...], reason: str
) -> None:
    source = from_peft(tmp_path / "theirs", tiny_model)
    path = source / "adapter_model.safetensors"
    tensors = {key: torch.from_numpy(value) for key, value in load_file(path).items()}
    save_file({**tensors, name: torch.zeros(shape)}, path)
    with pytest.raises(MlxDistillError, match=reason):
        take(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_matrices_that_the_base_has_not_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    source = from_peft(tmp_path / "theirs", tiny_model)
    smaller = make_tiny_model(tmp_path / "smaller", layers=2)
    narrower = make_tiny_model(tmp_path / "narrower", hidden=32)
    for model, reason in ((smaller, "has no such matrix"), (narrower, "for another model")):
        with pytest.raises(ModelError, match=reason):
            take(source, tmp_path / "run", model)


def test_a_rank_above_that_of_a_matrix_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    source = from_peft(tmp_path / "theirs", tiny_model, r=65)
    with pytest.raises(ModelError, match="rank 65 does not fit"):
        take(source, tmp_path / "run")


def test_another_base_of_the_same_shape_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    """By the hash that the export recorded."""
    run = random_run(tmp_path / "run", tiny_model, rank=4)
    export(asked(run, "peft", verify=False))
    other = make_tiny_model(tmp_path / "other", seed=3)
    with pytest.raises(ModelError, match="for another model"):
        take(run / "export" / "peft", tmp_path / "back", other)
    assert not (tmp_path / "back").exists()


def test_a_pickle_is_not_read(tmp_path: Path, tiny_model: Path) -> None:
    source = from_peft(tmp_path / "theirs", tiny_model)
    (source / "adapter_model.safetensors").rename(source / "adapter_model.bin")
    with pytest.raises(InputError, match="pickle"):
        take(source, tmp_path / "run")
    (source / "adapter_model.bin").unlink()
    with pytest.raises(InputError, match="no such file"):
        take(source, tmp_path / "run")


def test_a_cut_file_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    source = from_peft(tmp_path / "theirs", tiny_model)
    path = source / "adapter_model.safetensors"
    whole = path.read_bytes()
    for count in (0, 4, 9, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:count])
        with pytest.raises(InputError, match="not a whole safetensors file"):
            take(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path, tiny_model: Path) -> None:
    source = from_peft(tmp_path / "theirs", tiny_model)
    with layout.lock(tmp_path / "run"), pytest.raises(MlxDistillError, match="in use"):
        take(source, tmp_path / "run")
    assert not RunFolder(tmp_path / "run").record.exists()
