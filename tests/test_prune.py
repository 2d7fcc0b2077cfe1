"""Pruning: the layers that go are those that cost least, and what is written is the model without them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load, load_model

from mlx_distill.agreement import ProbeRow
from mlx_distill.backends.mlx.layer_settings import ARCHITECTURES
from mlx_distill.backends.mlx.loading import load_frozen
from mlx_distill.backends.mlx.pruning import LayerReader, eliminate, loss_of, measure, write_layers
from mlx_distill.errors import InputError, ModelError
from mlx_distill.layout import RunFolder, pruned_record, read_record
from mlx_distill.models.resolve import resolve
from mlx_distill.prune import PrunedRecord
from mlx_distill.runs import read_run
from mlx_distill.training.run import train
from tests.fusing import quantize, store_as
from tests.pruning import OWN_SETTINGS, files_of, make_identity, make_model, pruned, weights_of, with_layers
from tests.tiny import make_tiny_model
from tests.training.runs import make_data, settings

TOKENS = [5, 17, 300, 42, 8, 250, 99, 3, 120, 77]

ROWS = (
    ProbeRow(tokens=tuple(TOKENS), positions=(3, 4, 5, 8)),
    ProbeRow(tokens=tuple(range(40, 70)), positions=tuple(range(10, 29))),
    ProbeRow(tokens=(9, 200, 31, 7), positions=(2,)),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def logits(model: nn.Module) -> np.ndarray[Any, Any]:
    return np.array(model(mx.array([TOKENS])).astype(mx.float32)[0])


def loaded(folder: Path) -> nn.Module:
    model, _ = load(str(folder))
    model.set_dtype(mx.float32)
    return model


def plain_loss(model: nn.Module, rows: Sequence[ProbeRow] = ROWS) -> float:
    """By the definition, in float64 beyond the logits."""
    total, count = 0.0, 0
    for row in rows:
        said = np.array(model(mx.array([row.tokens])).astype(mx.float32))[0].astype(np.float64)[list(row.positions)]
        shifted = said - said.max(axis=1, keepdims=True)
        chosen = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        total -= float(chosen[np.arange(len(row.targets)), list(row.targets)].sum())
        count += len(row.targets)
    return total / count


def own_rows(folder: Path) -> list[ProbeRow]:
    """Text that the model writes itself, greedily: whatever else it would say is less likely to it."""
    model = with_layers(folder, range(4))
    rows = []
    for row in ROWS:
        tokens = list(row.tokens)
        for _ in range(12):
            tokens.append(int(model(mx.array([tokens]))[0, -1].argmax().item()))
        rows.append(ProbeRow(tokens=tuple(tokens), positions=tuple(range(len(row.tokens) - 1, len(tokens) - 1))))
    return rows


# What is measured.


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_a_layer_that_does_nothing_goes_first_and_costs_nothing(tmp_path: Path, layer: int) -> None:
    model = make_identity(make_tiny_model(tmp_path / "model"), layer)
    found = measure(model, own_rows(model), 3)
    assert found.removed == ((layer, found.loss),)


def test_each_layer_that_goes_is_the_one_that_brute_force_finds(tiny_model: Path) -> None:
    found = measure(tiny_model, ROWS, 1)
    assert found.loss == pytest.approx(plain_loss(with_layers(tiny_model, range(4))), abs=1e-6)
    kept = [0, 1, 2, 3]
    for layer, loss in found.removed:
        losses = {one: plain_loss(with_layers(tiny_model, [k for k in kept if k != one])) for one in kept}
        assert layer == min(losses, key=lambda one: losses[one])
        assert loss == pytest.approx(losses[layer], abs=1e-6)
        kept.remove(layer)
    assert tuple(kept) == found.kept
    # Or the order would not matter, and the test say nothing.
    assert len({round(loss, 3) for _, loss in found.removed}) == 3


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma", "granite", "smollm3"])
def test_reusing_what_lies_below_changes_nothing(tmp_path: Path, kind: str) -> None:
    """To the bit: the same operations on the same numbers."""
    folder = make_model(tmp_path / "model", kind)
    model, _ = load_frozen(folder, dtype="float32")
    reader = LayerReader(model)
    for kept in ([0, 1, 2, 3], [0, 2, 3], [1, 3], [2]):
        for row in ROWS:
            plain = [loss_of(with_layers(folder, [k for k in kept if k != one]), row) for one in kept if len(kept) > 1]
            assert reader.losses_without_each(row, kept)[: len(plain)] == plain
            assert reader.loss(row, kept) == loss_of(with_layers(folder, kept), row)
    assert len(set(reader.losses_without_each(ROWS[1], range(4)))) == 4


def test_a_row_is_read_half_as_often_as_there_are_pairs_of_layers(tmp_path: Path) -> None:
    """R layers and R places to leave one out: R(R-1)/2 layers above the gaps, and R - 1 on the way up."""
    model, _ = load_frozen(make_tiny_model(tmp_path / "model", layers=6), dtype="float32")
    calls: list[int] = []

    class Counting:
        def __init__(self, number: int, layer: nn.Module) -> None:
            self.number, self.layer = number, layer

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            calls.append(self.number)
            return self.layer(*arguments, **options)

    reader = LayerReader(model)
    reader._layers = [Counting(number, layer) for number, layer in enumerate(model.model.layers)]
    reader.losses_without_each(ROWS[0], range(6))
    assert len(calls) == 6 * 5 // 2 + 5
    # The layers that do not exist any more are not computed.
    calls.clear()
    reader.losses_without_each(ROWS[0], [0, 4, 5])
    assert sorted(calls) == [0, 4, 4, 5, 5]


def test_the_model_is_as_it_was_after_reading(tiny_model: Path) -> None:
    model, _ = load_frozen(tiny_model, dtype="float32")
    layers, said = list(model.model.layers), logits(model)
    reader = LayerReader(model)
    eliminate(reader, ROWS, 2)
    assert all(one is other for one, other in zip(model.model.layers, layers, strict=True))
    assert np.array_equal(logits(model), said)


def test_windows_go_with_their_layers(tmp_path: Path, data: Path) -> None:
    """A mask is its layer's, not its place's."""
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    model = make_model(tmp_path / "model", "llama", layer_types=kinds, sliding_window=3)
    assert not np.allclose(logits(loaded(model)), logits(loaded(make_model(tmp_path / "other", "llama"))))
    record = pruned(model, tmp_path / "out", data, keep=3)
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["layer_types"] == [kinds[at] for at in record.kept]
    reader = LayerReader(load_frozen(model, dtype="float32")[0])
    for row in ROWS:
        assert loss_of(loaded(tmp_path / "out"), row) == reader.loss(row, record.kept)


# What is written.


@pytest.mark.parametrize("kind", sorted(ARCHITECTURES))
def test_the_folder_says_what_the_model_without_the_layers_says(tmp_path: Path, data: Path, kind: str) -> None:
    """Of every architecture that is not refused: in mlx-lm to the bit, and in transformers."""
    from transformers import AutoModelForCausalLM

    model = make_model(tmp_path / "model", kind)
    record = pruned(model, tmp_path / "out", data, rows=3)
    expected = logits(with_layers(model, record.kept))
    assert np.array_equal(logits(loaded(tmp_path / "out")), expected)
    assert np.abs(logits(loaded(model)) - expected).max() > 0.05
    import torch

    other, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    assert not told["missing_keys"] and not told["unexpected_keys"]
    with torch.no_grad():
        found = other(torch.tensor([TOKENS])).logits[0].numpy()
    assert np.abs(found - expected).max() < 1e-5 * max(1, np.abs(expected).max())


def test_every_architecture_is_tested() -> None:
    assert OWN_SETTINGS.keys() == ARCHITECTURES


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_copied_under_their_new_numbers(tmp_path: Path, data: Path, dtype: str, tied: bool) -> None:
    model = store_as(make_tiny_model(tmp_path / "model", tied=tied), dtype)
    record = pruned(model, tmp_path / "out", data, keep=2)
    before, after = weights_of(model), weights_of(tmp_path / "out")
    names = {name: name for name in before if ".layers." not in name}
    for number, was in enumerate(record.kept):
        names |= {
            name.replace(f".layers.{was}.", f".layers.{number}."): name for name in before if f".layers.{was}." in name
        }
    assert after.keys() == names.keys()
    for new, old in names.items():
        assert after[new].dtype == before[old].dtype == getattr(mx, dtype)
        assert mx.array_equal(after[new], before[old]), new
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config.pop("num_hidden_layers") == 2
    whole = json.loads((model / "config.json").read_text(encoding="utf-8"))
    assert whole.pop("num_hidden_layers") == 4
    assert config == whole


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_stays_as_it_is(tmp_path: Path, data: Path, bits: int) -> None:
    model = quantize(make_tiny_model(tmp_path / "model"), bits)
    record = pruned(model, tmp_path / "out", data, keep=2)
    before, after = weights_of(model), weights_of(tmp_path / "out")
    assert len(after) < len(before)
    for name, value in after.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(record.kept[int(parts[2])])
        assert value.dtype == before[".".join(parts)].dtype
        assert mx.array_equal(value, before[".".join(parts)]), name
    assert np.array_equal(logits(loaded(tmp_path / "out")), logits(with_layers(model, record.kept)))


def test_matrices_quantized_in_their_own_way_are_found_under_their_new_number(tmp_path: Path) -> None:
    """As `fuse` leaves them: some of a layer dequantized, or quantized to other bits."""
    from mlx_lm.utils import quantize_model, save_model

    model = make_tiny_model(tmp_path / "model")
    network, config = load_model(model)

    def way(name: str, module: nn.Module) -> bool | dict[str, Any]:
        if name == "model.layers.2.mlp.up_proj":
            return False
        return {"group_size": 32, "bits": 8 if name == "model.layers.3.mlp.down_proj" else 4, "mode": "affine"}

    network, config = quantize_model(network, config, group_size=32, bits=4, quant_predicate=way)
    config["quantization"]["model.layers.2.mlp.up_proj"] = False
    save_model(model, network, donate_model=True)
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "out").mkdir()
    write_layers(model, (0, 2, 3), tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["quantization"]
    assert found["model.layers.2.mlp.down_proj"]["bits"] == 8
    assert found["model.layers.1.mlp.up_proj"] is False
    assert not any(key.startswith("model.layers.3.") for key in found)
    small, _ = load_model(tmp_path / "out")
    small.set_dtype(mx.float32)
    assert np.array_equal(logits(small), logits(with_layers(model, (0, 2, 3))))


def test_the_same_model_loses_the_same_layers(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    first = pruned(tiny_model, tmp_path / "first", data)
    assert pruned(tiny_model, tmp_path / "again", data) == first
    assert files_of(tmp_path / "first") == files_of(tmp_path / "again")
    pruned(tiny_model, tmp_path / "first", data)
    assert files_of(tmp_path / "first") == files_of(tmp_path / "again")


def test_the_record_says_what_was_done(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    record = pruned(tiny_model, tmp_path / "out", data, keep=1, rows=4)
    assert read_record(pruned_record(tmp_path / "out"), PrunedRecord) == record
    assert (record.model, record.source_kind) == (str(tiny_model), "folder")
    assert record.revision == resolve(str(tiny_model)).revision
    assert (record.layers, record.source, record.rows) == (4, "train", 4)
    assert sorted([*record.kept, *(removal.layer for removal in record.removed)]) == [0, 1, 2, 3]
    assert record.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


def test_what_belongs_to_a_model_comes_along(tmp_path: Path, data: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    (model / "LICENSE").write_text("free", encoding="utf-8")
    (model / "generation_config.json").write_text('{"top_k": 1}', encoding="utf-8")
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Model", encoding="utf-8")
    (model / "modeling_evil.py").write_text("raise SystemExit", encoding="utf-8")
    record = pruned(model, tmp_path / "out", data)
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    assert not (tmp_path / "out" / "modeling_evil.py").exists()
    assert record.licence == resolve(str(tmp_path / "out")).licence == "apache-2.0"


def test_a_pruned_model_learns_as_a_student_and_can_be_pruned_again(
    tmp_path: Path, tiny_model: Path, data: Path
) -> None:
    pruned(tiny_model, tmp_path / "small", data, keep=3)
    train(settings(data, tmp_path / "small", tmp_path / "run", epochs=1, batch_size=10, layers="all"))
    run = read_run(tmp_path / "run")
    assert run.status == "finished"
    names = set(mx.load(str(RunFolder(tmp_path / "run").adapter)))
    assert {name.split(".")[2] for name in names} == {"0", "1", "2"}
    load(str(tmp_path / "small"), adapter_path=str(tmp_path / "run"))
    record = pruned(tmp_path / "small", tmp_path / "smaller", data, keep=1)
    assert (record.layers, len(record.kept)) == (3, 1)
    loaded(tmp_path / "smaller")


# The rows.


def test_held_out_rows_are_the_last_to_be_learned_from(tmp_path: Path, tiny_model: Path) -> None:
    folder = make_data(tmp_path / "data")
    for name in ("train", "valid", "test"):
        assert pruned(tiny_model, tmp_path / "out", folder, keep=3).source == name
        (folder / f"{name}.jsonl").unlink()
    with pytest.raises(InputError, match="no data set"):
        pruned(tiny_model, tmp_path / "out", folder, keep=3)


def test_long_rows_are_cut_and_rows_without_loss_passed_over(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "data").mkdir()
    rows = [
        {"messages": [{"role": "user", "content": "x" * 3000}, {"role": "assistant", "content": "too late"}]},
        {"messages": [{"role": "user", "content": "say"}, {"role": "assistant", "content": "7 " * 3000}]},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data" / "train.jsonl").write_text(text, encoding="utf-8")
    record = pruned(tiny_model, tmp_path / "out", tmp_path / "data", keep=3)
    assert record.rows == 1
    assert 400 < record.tokens < 512
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(rows[0]) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="anything to learn in its first 512 tokens"):
        pruned(tiny_model, tmp_path / "out", tmp_path / "data", keep=3)


def test_without_data_the_answers_that_ship_are_read(tmp_path: Path, tiny_model: Path) -> None:
    record = pruned(tiny_model, tmp_path / "out", None, keep=3, rows=2)
    assert (record.source, record.rows) == ("starter", 2)
    other = make_tiny_model(tmp_path / "base", chat_template=None)
    with pytest.raises(ModelError, match="no chat template"):
        pruned(other, tmp_path / "none", None, keep=3)
