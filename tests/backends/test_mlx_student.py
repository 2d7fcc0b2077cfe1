"""The MLX student against mlx-lm: the same loss, and adapters that both read."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.granite import Model as Granite
from mlx_lm.models.granite import ModelArgs as GraniteArgs
from mlx_lm.tuner.trainer import default_loss, evaluate
from mlx_lm.utils import load, load_model, quantize_model, save_model

from mlx_distill.backends.base import NO_TOKENS, StepStats
from mlx_distill.backends.mlx.student import MlxStudent
from mlx_distill.batches import Batch, TokenRow, in_order, make_batch
from mlx_distill.config import TrainConfig
from mlx_distill.dataset import tokenise_split
from mlx_distill.errors import ModelError
from mlx_distill.models.tokenizer import load_tokenizer
from tests.backends.students import random_rows, replace_model
from tests.tiny import make_tiny_model, make_tokenizer
from tests.training.runs import make_data, settings


def config(model: Path, **changes: Any) -> TrainConfig:
    return settings(Path("data"), model, Path("run"), **changes)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> list[TokenRow]:
    data = make_data(tmp_path_factory.mktemp("rows"), train=9)
    return list(tokenise_split(data / "train.jsonl", load_tokenizer(tiny_model), max_length=512).rows)


@pytest.fixture(params=["qwen2-tied", "qwen2-untied", "llama-tied", "llama-untied", "qwen2-4-bit", "llama-8-bit"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    architecture, kind = request.param.split("-", 1)
    folder = make_tiny_model(tmp_path / "model", architecture=architecture, tied=kind != "untied")
    return folder if "tied" in kind else quantize(folder, int(kind[0]))


def quantize(folder: Path, bits: int) -> Path:
    """Quantize a model's weights in place, as `mlx_lm.convert -q` does."""
    loaded, description = load_model(folder)
    loaded, description = quantize_model(loaded, description, group_size=32, bits=bits)
    save_model(folder, loaded, donate_model=True)
    (folder / "config.json").write_text(json.dumps(description), encoding="utf-8")
    return folder


def train(student: MlxStudent, rows: list[TokenRow], *, steps: int = 3) -> None:
    for _ in range(steps):
        student.step([make_batch(rows, range(len(rows)))], 2e-2)


def over(student: MlxStudent, rows: list[TokenRow], size: int = 4) -> StepStats:
    return sum((student.evaluate(batch) for batch in in_order(rows, size)), NO_TOKENS)


def single(row: TokenRow, at: int) -> Batch:
    """A batch whose only target is the token at a place."""
    return make_batch([TokenRow(row.tokens, np.arange(len(row.tokens)) == at)], [0])


def logits_of(model: nn.Module, row: TokenRow) -> np.ndarray[Any, Any]:
    return np.array(model(mx.array(row.tokens[None])).astype(mx.float32))[0]


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    wide = logits.astype(np.float64)
    top = wide.max(axis=-1, keepdims=True)
    return wide - top - np.log(np.exp(wide - top).sum(axis=-1, keepdims=True))


def test_an_adapter_loads_in_mlx_lm_and_says_there_what_it_says_here(
    tmp_path: Path, model: Path, rows: list[TokenRow]
) -> None:
    student = MlxStudent(model, config(model))
    train(student, rows)
    student.save_adapter(tmp_path / "run")
    theirs, _ = load(str(model), adapter_path=str(tmp_path / "run"))
    plain, _ = load(str(model))
    row = rows[3]
    expected = log_softmax(logits_of(theirs, row))
    for at in range(1, len(row.tokens), 3):
        loss = student.evaluate(single(row, at)).loss_sum
        assert loss == pytest.approx(-expected[at - 1, row.tokens[at]], rel=1e-4, abs=1e-5)
    assert np.abs(log_softmax(logits_of(plain, row)) - expected).max() > 0.05


def test_what_mlx_lm_saved_is_read_back(tmp_path: Path, tiny_model: Path, rows: list[TokenRow]) -> None:
    """mlx-lm writes the trainable parameters of its model under the same names."""
    student = MlxStudent(tiny_model, config(tiny_model))
    train(student, rows)
    student.save_adapter(tmp_path / "run")
    trained = over(student, rows)
    theirs, _ = load(str(tiny_model), adapter_path=str(tmp_path / "run"))
    names = {name for name, _ in tree_flatten(theirs.parameters()) if ".lora_" in name}
    assert names == set(mx.load(str(tmp_path / "run" / "adapters.safetensors")))
    other = MlxStudent(tiny_model, config(tiny_model, seed=9))
    assert over(other, rows) != trained
    other.load_adapter(tmp_path / "run")
    assert over(other, rows) == trained


def test_the_loss_is_mlx_lms_own(model: Path, rows: list[TokenRow]) -> None:
    """mlx-lm counts a row's first padding token too (its mask is `steps <= length`); its rows are given one shorter.

    Every row has one assistant turn at its end, which is what mlx-lm's masks can express.
    """
    student = MlxStudent(model, config(model))
    ours = over(student, rows)
    theirs, _ = load(str(model))

    def batches(**_: Any) -> Any:
        for row in rows:
            first = int(np.flatnonzero(row.loss_mask)[0])
            yield mx.array(row.tokens[None]), mx.array([[first, len(row.tokens) - 1]])

    found = evaluate(theirs, rows, 1, -1, loss=default_loss, iterate_batches=batches)
    assert ours.loss == pytest.approx(found, rel=1e-4)


def test_accuracy_and_loss_are_those_of_whole_logits(model: Path, rows: list[TokenRow]) -> None:
    student = MlxStudent(model, config(model))
    theirs, _ = load(str(model))
    loss, correct = 0.0, 0
    for row in rows:
        logits = logits_of(theirs, row)
        places = np.flatnonzero(row.loss_mask)
        loss -= log_softmax(logits)[places - 1, row.tokens[places]].sum()
        correct += int((logits[places - 1].argmax(axis=-1) == row.tokens[places]).sum())
    for size in (1, 4, 9):
        found = over(student, rows, size)
        assert found.loss_sum == pytest.approx(loss, rel=1e-4)
        assert found.correct == correct
        assert found.target_tokens == sum(row.target_tokens for row in rows)
        assert found.tokens == sum(len(row.tokens) for row in rows)


def long_rows() -> list[TokenRow]:
    """Rows of 20 to 400 tokens: several blocks of any blocked attention, and much padding beside the shortest."""
    return random_rows((400, 129, 128, 20), seed=4, share=0.5)


def test_the_gradient_is_that_of_mlx_lms_model(tmp_path: Path, model: Path) -> None:
    """Adam's first moment after one step is a tenth of the gradient: by it, every value is compared.

    Against whole logits, a plain cross-entropy and mlx-lm's own layers, one row at a time.
    """
    start = MlxStudent(model, config(model))
    train(start, long_rows()[2:], steps=2)
    start.save_adapter(tmp_path / "start")
    student = MlxStudent(model, config(model, grad_clip=None, optimizer="adam"))
    student.load_adapter(tmp_path / "start")
    stats = student.step([make_batch(long_rows(), range(4))], 1e-3)
    moments = {
        name.removeprefix("optimizer.").removesuffix(".m"): value
        for name, value in student.state().arrays.items()
        if name.startswith("optimizer.") and name.endswith(".m")
    }

    theirs, _ = load(str(model), adapter_path=str(tmp_path / "start"))
    theirs.freeze()
    theirs.unfreeze(keys=["lora_a", "lora_b"], strict=False)

    def loss(tokens: mx.array, places: mx.array) -> mx.array:
        logits = theirs(tokens[None])[0, places - 1].astype(mx.float32)
        return nn.losses.cross_entropy(logits, tokens[places], reduction="sum")

    total: dict[str, Any] = {}
    loss_sum = 0.0
    for row in long_rows():
        places = mx.array(np.flatnonzero(row.loss_mask))
        value, gradient = nn.value_and_grad(theirs, loss)(mx.array(row.tokens), places)
        loss_sum += value.item()
        for name, array in tree_flatten(gradient):
            total[name] = total.get(name, 0.0) + np.array(array)
    assert stats.loss_sum == pytest.approx(loss_sum, rel=1e-4)
    assert moments.keys() == total.keys()
    largest = max(np.abs(array).max() for array in total.values()) / stats.target_tokens
    for name, array in total.items():
        np.testing.assert_allclose(
            moments[name] * 10, array / stats.target_tokens, rtol=1e-2, atol=1e-4 * largest, err_msg=name
        )


def test_rows_of_many_blocks_have_mlx_lms_loss(model: Path) -> None:
    theirs, _ = load(str(model))
    student = MlxStudent(model, config(model))
    for row in long_rows():
        places = np.flatnonzero(row.loss_mask)
        expected = -log_softmax(logits_of(theirs, row))[places - 1, row.tokens[places]].sum()
        assert over(student, [row]).loss_sum == pytest.approx(expected, rel=1e-4)


def test_a_sliding_window_is_kept(tmp_path: Path) -> None:
    """Layers that see the last 16 tokens alone: no short probe tells them from layers that see all."""
    folder = make_tiny_model(tmp_path / "model", architecture="llama")
    description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    description |= {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}
    (folder / "config.json").write_text(json.dumps(description), encoding="utf-8")
    test_rows_of_many_blocks_have_mlx_lms_loss(folder)


def test_rows_of_equal_number_are_not_mistaken_for_one_another(tiny_model: Path) -> None:
    """Each split counts its rows from 0, and what is kept of a row must be that row's."""
    first, second = long_rows()[0], long_rows()[1]
    one = MlxStudent(tiny_model, config(tiny_model))
    found = [over(one, [row]) for row in (first, second, first)]
    assert found[0] == found[2]
    assert found[1] == over(MlxStudent(tiny_model, config(tiny_model)), [second])
    beginning = TokenRow(first.tokens[:60], first.loss_mask[:60])
    assert over(one, [beginning]) == over(MlxStudent(tiny_model, config(tiny_model)), [beginning])


def test_two_students_do_not_disturb_each_other(tiny_model: Path, rows: list[TokenRow]) -> None:
    alone = MlxStudent(tiny_model, config(tiny_model))
    train(alone, rows)
    expected = over(alone, rows)
    one, other = (MlxStudent(tiny_model, config(tiny_model, seed=seed)) for seed in (0, 7))
    for _ in range(3):
        train(one, rows, steps=1)
        train(other, rows, steps=1)
    assert over(one, rows) == expected


def test_every_kind_of_base_learns(model: Path, rows: list[TokenRow]) -> None:
    student = MlxStudent(model, config(model))
    before = over(student, rows)
    train(student, rows, steps=8)
    after = over(student, rows)
    assert after.loss < before.loss * 0.9
    assert "fused head" in student.ways


def test_the_adapter_is_in_mlx_lms_layout(tmp_path: Path, tiny_model: Path) -> None:
    student = MlxStudent(tiny_model, config(tiny_model, rank=5, scale=3.0, layers=3))
    student.save_adapter(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert written["fine_tune_type"] == "lora"
    assert written["num_layers"] == 3
    assert written["lora_parameters"] == {"rank": 5, "scale": 3.0, "dropout": 0.0}
    weights = mx.load(str(tmp_path / "adapters.safetensors"))
    assert all(value.dtype == mx.float32 for value in weights.values())
    assert {value.shape[-1 if name.endswith("a") else 0] for name, value in weights.items()} == {5}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapters.safetensors"]


def test_mlx_lms_own_generate_command_takes_the_adapter(tmp_path: Path, tiny_model: Path, rows: list[TokenRow]) -> None:
    student = MlxStudent(tiny_model, config(tiny_model))
    train(student, rows)
    student.save_adapter(tmp_path)
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(tiny_model), "--adapter-path", str(tmp_path)]
    done = subprocess.run(
        [*command, "--prompt", "add", "--max-tokens", "3"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Generation: " in done.stdout


# A head that is more than linear


def make_granite(folder: Path, *, logits_scaling: float) -> Path:
    """A tiny Granite, whose logits are divided by a constant."""
    tokenizer = make_tokenizer()
    make_tiny_model(folder, architecture="llama")
    description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    description |= {
        "model_type": "granite",
        "architectures": ["GraniteForCausalLM"],
        "logits_scaling": logits_scaling,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_bias": False,
        "mlp_bias": False,
        "vocab_size": tokenizer.get_vocab_size(),
    }
    mx.random.seed(2)
    return replace_model(folder, Granite(GraniteArgs.from_dict(description)), description)


def test_a_student_with_scaled_logits_trains_by_the_plain_loss(tmp_path: Path, rows: list[TokenRow]) -> None:
    folder = make_granite(tmp_path / "granite", logits_scaling=8.0)
    student = MlxStudent(folder, config(folder))
    assert "whole logits" in student.ways
    theirs, _ = load(str(folder))
    places = [(row, np.flatnonzero(row.loss_mask)) for row in rows]
    expected = -sum(log_softmax(logits_of(theirs, row))[at - 1, row.tokens[at]].sum() for row, at in places)
    assert over(student, rows).loss_sum == pytest.approx(expected, rel=1e-4)
    before = over(student, rows)
    train(student, rows, steps=8)
    assert over(student, rows).loss < before.loss


# What cannot be loaded


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    other = make_tiny_model(tmp_path / "other", hidden=32)
    (folder / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(ModelError, match="could not load this model"):
        MlxStudent(folder, config(folder))


def test_an_architecture_that_mlx_lm_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**description, "model_type": "perceptron"}), encoding="utf-8")
    with pytest.raises(ModelError, match="perceptron"):
        MlxStudent(folder, config(folder))


# On a real model


def test_smollm2_gives_mlx_lms_loss(smollm2: Path, tmp_path: Path) -> None:
    data = make_data(tmp_path, train=3)
    real = list(tokenise_split(data / "train.jsonl", load_tokenizer(smollm2), max_length=512).rows)
    ours = over(MlxStudent(smollm2, config(smollm2)), real)
    theirs, _ = load(str(smollm2), lazy=True)
    theirs.set_dtype(mx.float32)
    losses = []
    for row in real:
        places = np.flatnonzero(row.loss_mask)
        losses.append(-log_softmax(logits_of(theirs, row))[places - 1, row.tokens[places]])
    assert ours.loss == pytest.approx(float(np.concatenate(losses).mean()), rel=1e-4)
    assert math.isfinite(ours.loss)
