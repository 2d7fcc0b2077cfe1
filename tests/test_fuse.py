"""Fusing: the whole model says what base and adapter say, is a whole folder, and never half of one."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load
from safetensors.numpy import load_file, save_file

from mlx_distill.config import FuseConfig
from mlx_distill.errors import FolderError, InputError, ModelError, ResourceError
from mlx_distill.fuse import fuse
from mlx_distill.layout import RunFolder, file_sha256, fused_record, read_record
from mlx_distill.runs import FusedRecord, read_fused, read_run
from tests.fusing import quantize, store_as, trained
from tests.tiny import CHAT_TEMPLATE, make_tiny_model
from tests.training.runs import ROOT, environment

TOKENS = mx.array([[5, 17, 300, 42, 8, 250, 99, 3]])


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Path:
    return trained(tmp_path, tiny_model)


def logits(folder: Path, adapter: Path | None = None) -> np.ndarray[Any, Any]:
    model, _ = load(str(folder), adapter_path=None if adapter is None else str(adapter))
    model.set_dtype(mx.float32)
    return np.array(model(TOKENS))[0]


KINDS = pytest.mark.parametrize("kind", ["lora", "dora"])


@KINDS
@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_fused_model_says_what_base_and_adapter_say(
    tmp_path: Path, architecture: Any, tied: bool, kind: str
) -> None:
    base = make_tiny_model(tmp_path / "base", architecture=architecture, tied=tied)
    run = trained(tmp_path, base, adapter=kind)
    record = fuse(FuseConfig(run=run))
    expected, found = logits(base, run), logits(run / "fused")
    assert np.abs(found - expected).max() < 1e-4
    assert np.abs(logits(base) - expected).max() > 0.1
    assert record.layers == 2 * 7  # q, k, v, o, gate, up, down


@KINDS
def test_half_precision_is_kept_and_rounded_once(tmp_path: Path, kind: str) -> None:
    """Every value is one of the two float16 next to the exact one, and the two are right on average."""
    base = store_as(make_tiny_model(tmp_path / "base"), "float16")
    run = trained(tmp_path, base, adapter=kind)
    fuse(FuseConfig(run=run))
    weights = load_file(run / "fused" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float16)}
    assert np.abs(logits(run / "fused") - logits(base, run)).max() < 1e-2
    before = load_file(base / "model.safetensors")
    adapter = {name: value.astype(np.float64) for name, value in load_file(RunFolder(run).adapter).items()}
    for name in ("model.layers.3.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        update = 2.0 * adapter[f"{name}.lora_a"] @ adapter[f"{name}.lora_b"]
        exact = before[f"{name}.weight"].astype(np.float64) + update.T
        if kind == "dora":
            exact *= (adapter[f"{name}.m"] / np.linalg.norm(exact, axis=1))[:, None]
        found = weights[f"{name}.weight"].astype(np.float64)
        step = 2.0 ** (np.maximum(np.floor(np.log2(np.abs(exact))), -14) - 10)
        # float32's own rounding of the sum may go past a neighbour.
        off = (found - exact) / step
        assert np.abs(off).max() < 1.01
        # The mean of n errors, none over half a step in spread: five standard deviations.
        assert abs(off.mean()) < 5 * 0.5 / np.sqrt(off.size)
        assert np.abs(off).max() > 0.6, "all are the nearest"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_changes_too_small_for_the_type_are_not_lost(tmp_path: Path, dtype: str) -> None:
    """An adapter that is far below half a step of most weights still does what it does."""
    base = store_as(make_tiny_model(tmp_path / "base"), dtype)
    run = trained(tmp_path, base)
    adapter = load_file(RunFolder(run).adapter)
    factor = {"float16": 2.0**-6, "bfloat16": 2.0**-3}[dtype]
    save_file(
        {name: value * (factor if name.endswith("lora_b") else 1) for name, value in adapter.items()},
        RunFolder(run).adapter,
    )
    fuse(FuseConfig(run=run))
    asked, got = logits(base, run) - logits(base), logits(run / "fused") - logits(base)
    assert float((got * asked).sum() / (asked * asked).sum()) == pytest.approx(1, abs=0.1)


def test_the_same_adapter_gives_the_same_fused_model(tmp_path: Path) -> None:
    base = store_as(make_tiny_model(tmp_path / "base"), "bfloat16")
    run = trained(tmp_path, base)
    fuse(FuseConfig(run=run))
    fuse(FuseConfig(run=run, out=tmp_path / "again"))
    first, again = ((folder / "model.safetensors").read_bytes() for folder in (run / "fused", tmp_path / "again"))
    assert first == again


@pytest.mark.parametrize("changes", [{"rslora": True}, {"adapter": "dora", "rslora": True}], ids=["lora", "dora"])
def test_the_scale_and_the_targets_of_the_run_are_fused(
    tmp_path: Path, tiny_model: Path, changes: dict[str, Any]
) -> None:
    run = trained(tmp_path, tiny_model, targets="q_proj,down_proj", **changes)
    assert fuse(FuseConfig(run=run)).layers == 4
    assert np.abs(logits(run / "fused") - logits(tiny_model, run)).max() < 1e-4
    before, after = load_file(tiny_model / "model.safetensors"), load_file(run / "fused" / "model.safetensors")
    changed = {name for name, value in before.items() if not np.array_equal(value, after[name])}
    assert changed == {
        f"model.layers.{layer}.{part}.weight" for layer in (2, 3) for part in ("self_attn.q_proj", "mlp.down_proj")
    }


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_stays_quantized(tmp_path: Path, bits: int) -> None:
    """Quantizing the sum again rounds it, so the fused model is near: nearer than the base by far."""
    base = quantize(make_tiny_model(tmp_path / "base"), bits)
    run = trained(tmp_path, base)
    fuse(FuseConfig(run=run, quantized_base="requantize"))
    description = json.loads((run / "fused" / "config.json").read_text(encoding="utf-8"))
    assert description["quantization"]["bits"] == bits
    expected = logits(base, run)
    near, far = np.abs(logits(run / "fused") - expected).mean(), np.abs(logits(base) - expected).mean()
    assert near < far / {4: 2, 8: 20}[bits]


def test_unchanged_layers_are_the_bases_to_the_bit(run: Path, tiny_model: Path) -> None:
    fuse(FuseConfig(run=run))
    before, after = load_file(tiny_model / "model.safetensors"), load_file(run / "fused" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name, value in before.items() if not np.array_equal(value, after[name])}
    assert len(changed) == 14
    assert all(name.startswith(("model.layers.2.", "model.layers.3.")) for name in changed)


def test_the_tokenizer_and_the_template_come_along(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    (base / "chat_template.jinja").write_text(CHAT_TEMPLATE + "{# own #}", encoding="utf-8")
    (base / "LICENSE").write_text("free", encoding="utf-8")
    (base / "generation_config.json").write_text('{"top_k": 1}', encoding="utf-8")
    (base / "modeling_evil.py").write_text("raise SystemExit", encoding="utf-8")
    (base / "pytorch_model.bin").write_bytes(b"pickle")
    run = trained(tmp_path, base)
    fuse(FuseConfig(run=run))
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
        "generation_config.json",
    ):
        assert (run / "fused" / name).read_bytes() == (base / name).read_bytes()
    assert not (run / "fused" / "modeling_evil.py").exists()
    assert not (run / "fused" / "pytorch_model.bin").exists()
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == [".lock"]


def test_the_record_ties_it_to_its_adapter(run: Path, tmp_path: Path, tiny_model: Path) -> None:
    record = fuse(FuseConfig(run=run, out=tmp_path / "elsewhere"))
    assert read_fused(tmp_path / "elsewhere", run) == record
    assert record.adapter_sha256 == file_sha256(RunFolder(run).adapter)
    assert (record.base, record.run) == (str(tiny_model), str(run))
    assert record.bytes == (tmp_path / "elsewhere" / "model.safetensors").stat().st_size
    assert not RunFolder(run).fused.exists()
    other = trained(tmp_path / "other", tiny_model, seed=4)
    with pytest.raises(ModelError, match="another adapter"):
        read_fused(tmp_path / "elsewhere", other)
    with pytest.raises(InputError, match="mlx-distill fuse"):
        read_fused(tmp_path / "nowhere", run)


def test_fusing_again_gives_the_same_folder(run: Path) -> None:
    first = fuse(FuseConfig(run=run))
    content = {path.name: path.read_bytes() for path in (run / "fused").iterdir()}
    assert fuse(FuseConfig(run=run)) == first
    assert {path.name: path.read_bytes() for path in (run / "fused").iterdir()} == content


# What is refused


@pytest.mark.parametrize("inside", ["photo.jpg", "config.json", ".hidden"])
def test_a_foreign_folder_is_left_alone(run: Path, tmp_path: Path, inside: str) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / inside).write_text("precious", encoding="utf-8")
    with pytest.raises(FolderError, match="not a fused model of ours"):
        fuse(FuseConfig(run=run, out=out))
    assert (out / inside).read_text(encoding="utf-8") == "precious"


def test_a_file_in_the_place_of_the_folder_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious", encoding="utf-8")
    with pytest.raises(FolderError):
        fuse(FuseConfig(run=run, out=tmp_path / "mine"))
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "precious"


def test_an_empty_folder_is_taken(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    fuse(FuseConfig(run=run, out=tmp_path / "empty"))
    assert fused_record(tmp_path / "empty").exists()


def test_a_changed_base_is_refused(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    run = trained(tmp_path, base)
    make_tiny_model(base, seed=1)
    with pytest.raises(ModelError, match="is not what it was"):
        fuse(FuseConfig(run=run))
    assert not RunFolder(run).fused.exists()


def test_a_base_that_is_gone_is_named(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    run = trained(tmp_path, base)
    shutil.rmtree(base)
    with pytest.raises(ModelError, match="There is no model"):
        fuse(FuseConfig(run=run))


def test_a_run_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mlx-distill train"):
        fuse(FuseConfig(run=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("damage", [lambda content: content[:-20], lambda content: b"", lambda content: b"x" * 99])
def test_a_damaged_adapter_is_refused_and_leaves_the_old_model(run: Path, damage: Any) -> None:
    fuse(FuseConfig(run=run))
    before = (run / "fused" / "model.safetensors").read_bytes()
    adapter = RunFolder(run).adapter
    adapter.write_bytes(damage(adapter.read_bytes()))
    with pytest.raises(ModelError, match="does not load"):
        fuse(FuseConfig(run=run))
    assert (run / "fused" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == [".lock"]


@pytest.mark.parametrize("earlier", [True, False])
def test_a_full_disk_leaves_the_old_model_or_none(run: Path, earlier: bool) -> None:
    expected = fuse(FuseConfig(run=run))
    content = {path.name: path.read_bytes() for path in (run / "fused").iterdir()}
    if not earlier:
        shutil.rmtree(run / "fused")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, len(content["config.json"]), len(content["model.safetensors"]) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
        try:
            with pytest.raises(ResourceError, match="could not be written"):
                fuse(FuseConfig(run=run))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert (run / "fused").exists() == earlier
        assert {path.name: path.read_bytes() for path in (run / "fused").glob("*")} == (content if earlier else {})
        assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == [".lock"]
    assert fuse(FuseConfig(run=run)) == expected


# Killed


@pytest.mark.parametrize("again", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_kill_leaves_a_whole_model_or_none(run: Path, again: bool) -> None:
    """At random moments of each phase: afterwards the folder is absent or whole, and the same command makes it."""
    config = FuseConfig(run=run)
    expected = fuse(config)
    whole = {path.name: path.read_bytes() for path in (run / "fused").iterdir()}
    generator = random.Random(3)
    for phase in ("Reading", "Fusing", "Reading them") * 2:
        if not again:
            shutil.rmtree(run / "fused", ignore_errors=True)
        child = subprocess.Popen(
            [sys.executable, "-m", "mlx_distill", "fuse", str(run)],
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith(phase):
                break
        time.sleep(generator.random() * 0.2)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        if (run / "fused").exists():
            assert {path.name: path.read_bytes() for path in (run / "fused").iterdir()} == whole
        assert read_run(run).fusing == expected.check
    assert fuse(config) == expected
    assert read_record(fused_record(run / "fused"), FusedRecord) == expected
    assert {path.name: path.read_bytes() for path in (run / "fused").iterdir()} == whole
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == [".lock"]
