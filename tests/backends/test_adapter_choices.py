"""What an adapter is put on: the targets, ranks and layers that are asked for, or a refusal that says what there is."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.mixtral import Model as Mixtral
from mlx_lm.models.mixtral import ModelArgs as MixtralArgs
from mlx_lm.utils import load

from mlx_distill.errors import ConfigError
from tests.backends.students import mean_loss, over, parameters, quantize, replace_model, student, trained
from tests.tiny import make_tiny_model

# Targets


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("q_proj", {"self_attn.q_proj"}),
        ("self_attn.q_proj", {"self_attn.q_proj"}),
        (" v_proj , q_proj,q_proj ", {"self_attn.q_proj", "self_attn.v_proj"}),
        ("mlp.down_proj,o_proj", {"mlp.down_proj", "self_attn.o_proj"}),
        ("all", {f"self_attn.{x}_proj" for x in "qkvo"} | {f"mlp.{x}_proj" for x in ("gate", "up", "down")}),
    ],
)
def test_only_the_targets_are_adapted(tiny_model: Path, targets: str, names: set[str]) -> None:
    found = {name.rpartition(".")[0] for name in parameters(student(tiny_model, targets=targets))}
    assert found == {f"model.layers.{layer}.{name}" for layer in (2, 3) for name in names}


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        ("q_prj", "no matrix 'q_prj' (did you mean q_proj?)"),
        ("q_proj,mlp.down_prj", "no matrix 'mlp.down_prj' (did you mean mlp.down_proj?)"),
        ("proj", "no matrix 'proj'"),
        ("attn.q_proj", "no matrix 'attn.q_proj'"),
        ("q_proj,", "no matrix ''"),
        ("", "no matrix ''"),
        ("all,q_proj", "no matrix 'all'"),
        ("embed_tokens", "no matrix 'embed_tokens'"),
        ("input_layernorm", "no matrix 'input_layernorm'"),
    ],
)
def test_an_unknown_target_is_refused_with_what_there_is(tiny_model: Path, targets: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        student(tiny_model, targets=targets)
    assert says in caught.value.message
    assert caught.value.hint is not None
    assert "mlp.down_proj, mlp.gate_proj, mlp.up_proj, self_attn.k_proj" in caught.value.hint


# Ranks


@pytest.mark.parametrize("changes", [{}, {"adapter": "dora"}, {"rslora": True}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("bits", [None, 4, 8])
def test_a_rank_above_a_matrix_is_refused(tmp_path: Path, bits: int | None, changes: dict[str, Any]) -> None:
    """Keys have 32 rows in the tiny model, what a layer takes in and gives out 64."""
    base = make_tiny_model(tmp_path / "model")
    if bits:
        quantize(base, bits)
    for rank in (33, 10**12):
        with pytest.raises(ConfigError, match=r"smallest adapted matrix .*, self_attn\.k_proj, has rank 32"):
            student(base, rank=rank, **changes)
    assert parameters(student(base, rank=32, **changes))
    assert parameters(student(base, rank=64, targets="q_proj,up_proj", **changes))
    with pytest.raises(ConfigError, match="has rank 64"):
        student(base, rank=65, targets="q_proj,up_proj", **changes)


# Experts


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """A tiny Mixtral: four experts of 96, two for each token, in two layers of 64."""
    folder = make_tiny_model(tmp_path / "experts", architecture="llama")
    description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    description |= {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "num_hidden_layers": 2,
        "intermediate_size": 96,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    mx.random.seed(5)
    return replace_model(folder, Mixtral(MixtralArgs.from_dict(description)), description)


def test_doras_experts_are_refused_with_what_can_be_had(experts: Path) -> None:
    with pytest.raises(ConfigError, match=r"no DoRA for .*switch_mlp\.down_proj, .*switch_mlp\.up_proj") as caught:
        student(experts, adapter="dora", rank=2)
    assert caught.value.hint is not None
    targets = caught.value.hint.partition("--targets ")[2]
    assert targets.split(",")[-1] == "self_attn.v_proj"
    one = trained(experts, adapter="dora", rank=2, targets=targets)
    assert any(name.endswith("self_attn.v_proj.m") for name in parameters(one))
    assert over(one).loss < over(student(experts, adapter="dora", rank=2, targets=targets)).loss


def test_experts_learn_and_load_in_mlx_lm(experts: Path, tmp_path: Path) -> None:
    one = trained(experts, rank=4)
    one.save_adapter(tmp_path / "run")
    theirs, _ = load(str(experts), adapter_path=str(tmp_path / "run"))
    plain, _ = load(str(experts))
    assert over(one).loss == pytest.approx(mean_loss(theirs), rel=1e-4)
    assert over(one).loss < 0.98 * mean_loss(plain)


def test_an_experts_first_factor_starts_by_its_width(experts: Path) -> None:
    """Uniform in ±1/√in, whichever way round it lies."""
    found = parameters(student(experts, rank=4))
    factors = {name: value for name, value in found.items() if name.endswith("lora_a")}
    widths = set()
    for name, value in factors.items():
        width = value.shape[0] if value.ndim == 2 else value.shape[2]
        widths.add((value.ndim, width))
        assert 0.97 / math.sqrt(width) < np.abs(value).max() <= 1 / math.sqrt(width), name
    assert widths == {(2, 64), (3, 64), (3, 96)}


def test_a_rank_above_an_expert_or_a_router_is_refused(experts: Path) -> None:
    with pytest.raises(ConfigError, match=r"gate, has rank 4"):
        student(experts, rank=5)
    with pytest.raises(ConfigError, match=r"switch_mlp\.\w+_proj, has rank 64"):
        student(experts, rank=65, targets="gate_proj,down_proj,up_proj")


@pytest.mark.parametrize("bits", [3, 6])
def test_dora_where_mlx_lm_takes_a_wrong_width_is_refused(tmp_path: Path, bits: int) -> None:
    base = quantize(make_tiny_model(tmp_path / "model"), bits)
    with pytest.raises(ConfigError, match="no DoRA for"):
        student(base, adapter="dora")
    assert over(trained(base)).loss < over(student(base)).loss
