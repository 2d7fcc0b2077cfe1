"""What a model says to a probe is what its whole forward pass gives, whichever way it was computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.utils import load_adapters, load_model
from numpy.typing import NDArray

from mlx_distill.agreement import Observation, Probe, ProbeRow
from mlx_distill.backends.mlx import observing
from mlx_distill.backends.mlx.observing import observe, observe_folder
from mlx_distill.errors import ModelError
from mlx_distill.layout import RunFolder
from mlx_distill.training.run import train
from tests.tiny import make_tiny_model
from tests.training.runs import make_data, settings

VOCABULARY = 384


def random_probe(seed: int = 0, *, greedy_tokens: int = 12, end_tokens: tuple[int, ...] = ()) -> Probe:
    """Rows and prompts of unlike length; one row has more positions than are computed at once."""
    random = np.random.default_rng(seed)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(random.integers(0, VOCABULARY - 3, length).tolist())

    rows = [
        ProbeRow(tokens=tokens(length), positions=tuple(range(first, length - 1, step)))
        for length, first, step in ((9, 3, 1), (150, 0, 2), (2, 0, 1), (70, 5, 1))
    ]
    return Probe(
        rows=tuple(rows),
        prompts=(tokens(5), tokens(31), tokens(1)),
        greedy_tokens=greedy_tokens,
        end_tokens=end_tokens,
    )


def plain_logits(model: nn.Module, probe: Probe) -> NDArray[Any]:
    parts = [np.array(model(mx.array([row.tokens])))[0, list(row.positions)] for row in probe.rows]
    return np.concatenate(parts)


def plain_answer(model: nn.Module, prompt: tuple[int, ...], probe: Probe) -> tuple[int, ...]:
    """The whole text is read again for each token."""
    answer: list[int] = []
    while len(answer) < probe.greedy_tokens:
        token = int(mx.argmax(model(mx.array([[*prompt, *answer]]))[0, -1]).item())
        if token in probe.end_tokens:
            break
        answer.append(token)
    return tuple(answer)


def hold(model: nn.Module, probe: Probe, found: Observation) -> None:
    """Sums are added up in another order where rows are read at once, or one by one: 1e-5 of the logits' size."""
    np.testing.assert_allclose(found.logits, plain_logits(model, probe), rtol=0, atol=1e-5)
    assert found.greedy == tuple(plain_answer(model, prompt, probe) for prompt in probe.prompts)


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_model_is_seen_as_it_is(tmp_path: Path, architecture: Any, tied: bool) -> None:
    folder = make_tiny_model(tmp_path / "model", architecture=architecture, tied=tied)
    probe = random_probe()
    observe_folder(folder, None, probe, tmp_path / "seen")
    hold(load_model(folder)[0], probe, Observation.load(tmp_path / "seen"))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_is_seen_without_its_dropout(tmp_path: Path, tiny_model: Path, kind: str) -> None:
    run = tmp_path / "run"
    data = make_data(tmp_path / "data")
    train(settings(data, tiny_model, run, adapter=kind, dropout=0.5, learning_rate=0.02))
    probe = random_probe()
    for name in ("seen", "again"):
        observe_folder(tiny_model, run, probe, tmp_path / name)
    model, _ = load_model(tiny_model)
    bare = plain_logits(model, probe)
    load_adapters(model, str(run))
    model.eval()
    seen, again = Observation.load(tmp_path / "seen"), Observation.load(tmp_path / "again")
    hold(model, probe, seen)
    assert np.abs(seen.logits - bare).max() > 0.1
    np.testing.assert_array_equal(seen.logits, again.logits)
    assert seen.greedy == again.greedy


class Capped(nn.Module):
    """A model whose logits are more than a linear head gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.model = inner.model

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.inner.layers)

    def __call__(self, tokens: mx.array, cache: Any = None) -> mx.array:
        return 2 * mx.tanh(self.inner(tokens, cache=cache) / 2)


def test_a_head_that_is_more_than_linear_is_seen_whole(tmp_path: Path, tiny_model: Path) -> None:
    model = Capped(load_model(tiny_model)[0])
    probe = random_probe()
    observe(model, probe, tmp_path / "seen")
    found = Observation.load(tmp_path / "seen")
    hold(model, probe, found)
    assert np.abs(found.logits).max() <= 2


def test_an_end_mark_ends_an_answer_and_is_no_part_of_it(tmp_path: Path, tiny_model: Path) -> None:
    observe_folder(tiny_model, None, random_probe(), tmp_path / "whole")
    whole = Observation.load(tmp_path / "whole").greedy
    end = whole[0][4]
    probe = random_probe(end_tokens=(end, VOCABULARY - 1))
    observe_folder(tiny_model, None, probe, tmp_path / "ended")
    found = Observation.load(tmp_path / "ended")
    hold(load_model(tiny_model)[0], probe, found)
    assert found.greedy[0] == whole[0][: whole[0].index(end)]


@pytest.mark.parametrize("changes", [{"prompts": ()}, {"greedy_tokens": 0}])
def test_no_answer_is_asked_for(tmp_path: Path, tiny_model: Path, changes: dict[str, Any]) -> None:
    probe = random_probe().model_copy(update=changes)
    observe_folder(tiny_model, None, probe, tmp_path / "seen")
    assert Observation.load(tmp_path / "seen").greedy == ((),) * len(probe.prompts)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_computed_in_float32_on_a_cpu(tmp_path: Path, dtype: str) -> None:
    folder = make_tiny_model(tmp_path / "model")
    weights = mx.load(str(folder / "model.safetensors"))
    assert isinstance(weights, dict)
    halved = {name: value.astype(getattr(mx, dtype)) for name, value in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), halved)
    probe = random_probe()
    observe_folder(folder, None, probe, tmp_path / "seen")
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    hold(model, probe, Observation.load(tmp_path / "seen"))


def test_its_memory_is_given_back(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", hidden=128)
    before = mx.get_active_memory()
    observe_folder(folder, None, random_probe(), tmp_path / "seen")
    assert mx.get_active_memory() - before < 0.02 * (folder / "model.safetensors").stat().st_size
    assert mx.get_cache_memory() == 0


def test_no_more_logits_exist_at_once_than_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a vocabulary far wider than the model, memory is that of a few positions' logits."""
    wide = make_tiny_model(tmp_path / "wide", vocabulary=420, tied=False)
    monkeypatch.setattr(observing, "_CHUNK", 16)
    row = random_probe().rows[1]
    probe = Probe(rows=(row.model_copy(update={"positions": tuple(range(len(row.tokens) - 1))}),))
    sizes: list[int] = []
    real = observing.ObservationWriter.add_row

    def noted(writer: observing.ObservationWriter, logits: NDArray[Any]) -> None:
        sizes.append(len(logits))
        real(writer, logits)

    monkeypatch.setattr(observing.ObservationWriter, "add_row", noted)
    observe_folder(wide, None, probe, tmp_path / "seen")
    assert sum(sizes) == len(row.tokens) - 1
    assert max(sizes) == 16


# What does not load.


def test_an_adapter_of_another_model_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    run = tmp_path / "run"
    train(settings(make_data(tmp_path / "data"), tiny_model, run, epochs=1))
    other = make_tiny_model(tmp_path / "other", hidden=32)
    with pytest.raises(ModelError, match="does not load onto the model"):
        observe_folder(other, run, random_probe(), tmp_path / "seen")
    RunFolder(run).adapter.unlink()
    with pytest.raises(ModelError, match="does not load onto the model"):
        observe_folder(tiny_model, run, random_probe(), tmp_path / "seen")


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="could not load this model"):
        observe_folder(folder, None, random_probe(), tmp_path / "seen")
