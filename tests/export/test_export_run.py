"""The step around every format: what it takes, what it refuses, and that nothing is left of what failed."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_distill import layout
from mlx_distill.agreement import Probe, ProbeRow
from mlx_distill.cli.main import main
from mlx_distill.errors import ConfigError, FolderError, InputError, MlxDistillError, ModelError
from mlx_distill.export import verify
from mlx_distill.export.records import ExportRecord
from mlx_distill.export.run import export, export_folder
from mlx_distill.progress import Bar, Progress
from tests.export.exporting import asked, fused, left_over, random_run
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.slow

PROBE = Probe(rows=(ProbeRow(tokens=(5, 17, 300), positions=(0, 1)),))


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Path:
    return fused(tmp_path, tiny_model)


def test_the_record_says_what_was_made_of_what(run: Path) -> None:
    record = export(asked(run, "mlx", verify=False))
    assert record == layout.read_record(run / "export" / "mlx" / "mlx_distill_export.json", ExportRecord)
    assert (record.agreement, record.consumer, record.unverified) == (None, None, "not asked for")
    assert record.adapter_sha256 == layout.file_sha256(layout.RunFolder(run).adapter)
    assert record.base_source == "folder"
    assert record.bytes == sum((run / "export" / "mlx" / name).stat().st_size for name in record.files)


def test_a_fused_model_is_a_source_of_its_own(run: Path, tmp_path: Path) -> None:
    assert export_folder(asked(run / "fused", "mlx")) == run / "export" / "mlx"
    alone = tmp_path / "models" / "mine"
    alone.parent.mkdir()
    (run / "fused").rename(alone)
    assert export_folder(asked(alone, "mlx")) == alone.parent / "mine-mlx"
    assert export(asked(alone, "mlx", verify=False)).base_source == "folder"
    with pytest.raises(ConfigError, match="no adapter any more"):
        export(asked(alone, "peft"))


def test_a_run_that_is_not_fused_says_how(tmp_path: Path, tiny_model: Path) -> None:
    run = random_run(tmp_path / "run", tiny_model, rank=4)
    for to in ("hf", "mlx", "gguf", "ollama"):
        with pytest.raises(InputError) as caught:
            export(asked(run, to))
        assert f"mlx-distill fuse {run}" in str(caught.value)
    assert not (run / "export").exists()


def test_a_model_fused_from_an_earlier_adapter_is_refused(run: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = random_run(tmp_path / "other", tiny_model, rank=4)
    layout.RunFolder(run).adapter.write_bytes(layout.RunFolder(other).adapter.read_bytes())
    with pytest.raises(ModelError, match="another adapter"):
        export(asked(run, "hf"))


@pytest.mark.parametrize(
    "changes", [{"to": "hf", "quantize": "4"}, {"to": "peft", "quantize": "8"}, {"to": "mlx", "gguf_type": "q8_0"}]
)
def test_settings_of_another_format_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        export(asked(tmp_path, **changes))


def test_nothing_of_others_is_replaced(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "diary.txt").write_text("dear", encoding="utf-8")
    before = left_over(tmp_path)
    for out in (mine, run, run / "fused", tmp_path):
        with pytest.raises(FolderError):
            export(asked(run, "mlx", out=out, verify=False))
    assert left_over(tmp_path) == before
    with layout.lock(run), pytest.raises(FolderError, match="in use"):
        export(asked(run, "mlx", verify=False))


def test_an_export_takes_the_place_of_an_earlier_one(run: Path) -> None:
    export(asked(run, "mlx", quantize="4", verify=False))
    export(asked(run, "mlx", verify=False))
    assert "quantization" not in json.loads((run / "export" / "mlx" / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("which", ["weights", "config", "tokenizer", "pickle"])
def test_a_damaged_model_is_refused(run: Path, which: str) -> None:
    weights = run / "fused" / "model.safetensors"
    if which == "weights":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif which == "config":
        (run / "fused" / "config.json").write_text("{", encoding="utf-8")
    elif which == "tokenizer":
        (run / "fused" / "tokenizer.json").unlink()
    else:
        weights.rename(run / "fused" / "pytorch_model.bin")
    for to in ("hf", "mlx", "gguf"):
        with pytest.raises(ModelError):
            export(asked(run, to))
    assert not (run / "export").exists()


def test_files_from_elsewhere_do_not_come_along(run: Path, tmp_path: Path) -> None:
    """A link, and an index that names what is not in the folder."""
    (tmp_path / "key").write_text("secret", encoding="utf-8")
    (run / "fused" / "LICENSE").symlink_to(tmp_path / "key")
    with pytest.raises(ModelError, match="leads out of its folder"):
        export(asked(run, "mlx", verify=False))
    (run / "fused" / "LICENSE").unlink()
    index = run / "fused" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../key"}}), encoding="utf-8")
    with pytest.raises(ModelError, match="lacks 1 of 1 files"):
        export(asked(run, "hf", verify=False))
    assert not (run / "export").exists()


def test_an_architecture_that_a_gguf_has_no_name_for(run: Path) -> None:
    path = run / "fused" / "config.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"qwen2"', '"mamba9"'), encoding="utf-8")
    for to in ("gguf", "ollama"):
        with pytest.raises(ModelError, match="mamba9"):
            export(asked(run, to))
    assert not (run / "export").exists()


def test_where_the_consumer_is_not_installed_the_export_stays_and_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify.Consumer, "missing", lambda self: self.packages[0])
    record = export(asked(run, "gguf"))
    assert record.unverified == "xllamacpp is not installed: pip install 'mlx-distill[llama-cpp]'"
    assert record.agreement is None
    assert len(record.files) == 1


class Interrupting(Progress):
    """Ctrl-C where a task of this title begins."""

    def __init__(self, title: str) -> None:
        self._title = title

    @contextmanager
    def task(self, title: str, total: float | None = None, *, unit: str = "") -> Iterator[Bar]:
        if title.startswith(self._title):
            raise KeyboardInterrupt
        yield Bar()


@pytest.mark.parametrize("title", ["Writing", "Asking the student", "Asking the export"])
def test_an_interruption_leaves_nothing(run: Path, title: str) -> None:
    export(asked(run, "mlx", verify=False))
    before = {name: (run / name).read_bytes() for name in left_over(run)}
    with pytest.raises(KeyboardInterrupt):
        export(asked(run, "mlx", quantize="4"), Interrupting(title))
    assert {name: (run / name).read_bytes() for name in left_over(run)} == before


@pytest.mark.parametrize("engine", ["mlx", "torch", "llama_cpp"])
def test_what_a_consumer_cannot_take_is_told_by_its_reason(tmp_path: Path, engine: Any) -> None:
    """Each in a process of its own: none of them is worth a traceback."""
    model = make_tiny_model(tmp_path / "model")
    (model / "model.safetensors").write_bytes(b"GGUF" + bytes(100))
    path = model / "model.safetensors" if engine == "llama_cpp" else model
    with pytest.raises(ModelError) as caught:
        verify._observe(verify.Model(engine, path), PROBE, tmp_path / "out", "It")
    assert "Traceback" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_consumer_that_dies_is_told(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killer = tmp_path / "python"
    killer.write_text("#!/bin/sh\nkill -9 $$\n", encoding="utf-8")
    killer.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killer))
    with pytest.raises(ModelError, match="killed by SIGKILL, as where memory runs out"):
        verify._observe(verify.Model("mlx", tiny_model), PROBE, tmp_path / "out", "It")


def test_the_command_says_what_it_made(run: Path) -> None:
    done = CliRunner().invoke(main, ["export", str(run), "--to", "mlx"])
    assert done.exit_code == 0, done.output
    assert f"folder  {run / 'export' / 'mlx'}" in done.stdout
    assert "says what the student says: the same next token at 100.0%" in done.stdout
    assert "try it:  mlx_lm.generate --model" in done.stdout
    found = json.loads(CliRunner().invoke(main, ["export", str(run), "--to", "mlx", "--no-verify", "--json"]).stdout)
    assert (found["kind"], found["unverified"]) == ("mlx", "not asked for")


def test_a_folder_that_is_no_source_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    for source in (tmp_path / "nowhere", tiny_model, tmp_path):
        with pytest.raises(MlxDistillError) as caught:
            export(asked(source, "hf"))
        assert caught.value.hint
