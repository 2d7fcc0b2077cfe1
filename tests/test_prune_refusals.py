"""What pruning refuses, and what an error, a full disk or an interruption leaves behind."""

from __future__ import annotations

import json
import resource
import shutil
from collections import namedtuple
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_distill.backends.mlx import pruning
from mlx_distill.backends.mlx.layer_settings import cut_settings
from mlx_distill.backends.mlx.loading import load_frozen
from mlx_distill.config import PruneConfig
from mlx_distill.errors import ConfigError, FolderError, ModelError, ResourceError
from mlx_distill.progress import Bar, Progress
from mlx_distill.prune import prune
from tests.pruning import configure, files_of, make_identity, make_model, pruned, weights_of
from tests.tiny import make_tiny_model
from tests.training.runs import make_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


# The configuration.


def cut(kept: Sequence[int], **config: Any) -> dict[str, Any]:
    return cut_settings({"model_type": "qwen2", "num_hidden_layers": 4, **config}, kept, Path("m"))


def test_what_there_is_of_each_layer_is_cut() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    assert cut([1, 2], layer_types=kinds)["layer_types"] == ["sliding_attention", "full_attention"]
    assert cut([0, 3], eos_token_id=[1, 2, 3, 4])["eos_token_id"] == [1, 2, 3, 4]
    assert cut([0, 3], layer_types=None)["layer_types"] is None


@pytest.mark.parametrize(
    ("boundary", "kept", "expected"), [(28, [0, 3], 2), (2, [0, 1, 3], 2), (2, [0, 2, 3], 1), (2, [2, 3], 0)]
)
def test_the_layers_below_the_window_stay_below_it(boundary: int, kept: list[int], expected: int) -> None:
    assert cut(kept, max_window_layers=boundary)["max_window_layers"] == expected
    assert cut(kept, max_window_layers=boundary, use_sliding_window=True)["max_window_layers"] == expected


@pytest.mark.parametrize("kept", [(0, 1, 3), (1, 2, 3), (2, 3), (0,)])
def test_transformers_gives_each_layer_the_window_that_it_had(kept: tuple[int, ...]) -> None:
    from transformers import Qwen2Config

    whole: dict[str, Any] = {"max_window_layers": 2, "use_sliding_window": True, "sliding_window": 8}
    kinds = Qwen2Config(num_hidden_layers=4, **whole).layer_types
    assert len(set(kinds)) == 2
    small = cut(kept, **whole)
    small.pop("model_type")
    assert Qwen2Config(**small).layer_types == [kinds[at] for at in kept]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gemma2"}, "an architecture such as gemma2"),
        ({"model_type": None}, "an architecture such as None"),
        ({"num_hidden_layers": 1}, "num_hidden_layers = 1 is not the number"),
        ({"num_hidden_layers": None}, "num_hidden_layers = None is not the number"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types has 2 entries for 4 layers"),
        ({"layer_scales": [1, 2, 3, 4]}, "layer_scales may hold an entry for each layer"),
        ({"sliding_window_pattern": 6}, "sliding_window_pattern = 6"),
        ({"model_type": "smollm3", "no_rope_layer_interval": 4}, "without no_rope_layers"),
        ({"quantization_config": {"quant_method": "bitnet"}}, "quantized as bitnet"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        cut([0, 3], **changes)


# What is refused.


class Never(Progress):
    """Fails where anything is begun."""

    @contextmanager
    def task(self, title: str, total: float | None = None, *, unit: str = "") -> Iterator[Bar]:
        raise AssertionError(title)
        yield Bar()


def refused(model: Path, out: Path, keep: int = 2) -> None:
    prune(PruneConfig(model=str(model), keep_layers=keep, out=out), Never())


@pytest.mark.parametrize("keep", [4, 5])
def test_a_model_must_have_more_layers_than_it_keeps(tmp_path: Path, tiny_model: Path, keep: int) -> None:
    with pytest.raises(ConfigError, match=r"has 4 layers, so that none would go.\n  Choose 1 to 3"):
        refused(tiny_model, tmp_path / "out", keep)


@pytest.mark.parametrize("inside", ["photo.jpg", "config.json", ".hidden"])
def test_a_foreign_folder_is_left_alone(tmp_path: Path, tiny_model: Path, inside: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / inside).write_text("precious", encoding="utf-8")
    with pytest.raises(FolderError, match="not a pruned model of ours"):
        refused(tiny_model, tmp_path / "mine")
    assert files_of(tmp_path / "mine") == {inside: b"precious"}


def test_a_model_is_not_replaced_by_what_is_made_from_it(tmp_path: Path, tiny_model: Path, data: Path) -> None:
    pruned(tiny_model, tmp_path / "small", data, keep=3)
    before = files_of(tmp_path / "small")
    for name in ("small", "../" + tmp_path.name + "/small"):
        with pytest.raises(FolderError, match="which it would replace"):
            refused(tmp_path / "small", tmp_path / name)
    assert files_of(tmp_path / "small") == before


def test_an_unknown_architecture_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    model = configure(make_tiny_model(tmp_path / "model"), model_type="gemma2")
    with pytest.raises(ModelError):
        refused(model, tmp_path / "out")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "nonsense"}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="nonsense"):
        refused(model, tmp_path / "out")


def test_a_model_whose_loss_is_no_number_is_refused(tmp_path: Path, data: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    weights = weights_of(model)
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    mx.eval(weights)
    mx.save_safetensors(str(model / "model.safetensors"), weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="loss of this model is no number"):
        pruned(model, tmp_path / "out", data)
    assert not (tmp_path / "out").exists()


def test_too_little_disk_is_said_before_anything_is_measured(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is needed is what the layers that stay take, not the whole model."""
    size = {keep: sum(v.nbytes for v in with_weights(tiny_model, range(keep))) for keep in (1, 2, 3)}
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 0, size[2]))
    with pytest.raises(ResourceError, match="pruned model needs"):
        refused(tiny_model, tmp_path / "out", 3)
    with pytest.raises(AssertionError, match="Taking layers out"):
        refused(tiny_model, tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def with_weights(folder: Path, kept: Sequence[int]) -> list[mx.array]:
    others = [value for name, value in weights_of(folder).items() if ".layers." not in name]
    layers = [v for n, v in weights_of(folder).items() if ".layers." in n and int(n.split(".")[2]) in kept]
    return others + layers


@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_leaves_the_old_model_or_none(tmp_path: Path, tiny_model: Path, data: Path, earlier: bool) -> None:
    out = tmp_path / "out"
    expected = pruned(tiny_model, out, data, keep=3)
    content = files_of(out)
    if not earlier:
        shutil.rmtree(out)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, len(content["config.json"]), len(content["model.safetensors"]) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            with pytest.raises(ResourceError, match="could not be written"):
                pruned(tiny_model, out, data, keep=3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert out.exists() == earlier
        assert files_of(out) == (content if earlier else {})
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert pruned(tiny_model, out, data, keep=3) == expected


@pytest.mark.parametrize("phase", ["Taking", "Writing"])
def test_an_interruption_leaves_nothing_behind(tmp_path: Path, tiny_model: Path, data: Path, phase: str) -> None:
    class Interrupted(Progress):
        @contextmanager
        def task(self, title: str, total: float | None = None, *, unit: str = "") -> Iterator[Bar]:
            yield Bar()
            if title.startswith(phase):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(PruneConfig(model=str(tiny_model), keep_layers=2, out=tmp_path / "out", data=data), Interrupted())
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_and_says_something_else_is_not_kept(
    tmp_path: Path, tiny_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate itself: other layers than were measured are written."""
    honest = pruning.write_layers
    monkeypatch.setattr(pruning, "write_layers", lambda folder, kept, out: honest(folder, tuple(reversed(kept)), out))
    with pytest.raises(ModelError, match="does not work with 2 of its layers: The model that was written has a loss"):
        pruned(tiny_model, tmp_path / "out", data)
    assert list(tmp_path.iterdir()) == []


def test_layers_of_another_kind_are_refused(tmp_path: Path) -> None:
    """A norm or a bias that one layer has alone."""
    model = load_frozen(make_tiny_model(tmp_path / "model"), dtype="float32")[0]
    model.model.layers[2].self_attn.o_proj.bias = mx.zeros(64)
    with pytest.raises(ModelError, match=r"layer 2 is of another kind than layer 0: self_attn.o_proj.bias"):
        pruning._require_alike(model.model.layers, tmp_path)


def test_what_mlx_lm_cannot_load_without_its_layers_is_not_kept(tmp_path: Path, data: Path) -> None:
    """mlx-lm's Llama needs a layer without a window."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    model = make_identity(make_model(tmp_path / "model", "llama", layer_types=kinds, sliding_window=3), 1)
    with pytest.raises(ModelError, match="does not work with 3 of its layers") as caught:
        pruned(model, tmp_path / "out", data, keep=3)
    assert ".part-" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
