"""A run on a model of the Hub stays with the commit that it began with, whatever the branch has become since."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

import tests.hub_server
from mlx_distill.config import FuseConfig
from mlx_distill.errors import ModelError
from mlx_distill.fuse import fuse
from mlx_distill.models.bundled import BUNDLED
from mlx_distill.models.resolve import resolve, resolve_again
from mlx_distill.records import ModelRecord
from mlx_distill.runs import read_run, resolve_base
from mlx_distill.training.run import train
from tests.hub_server import COMMIT, HubServer, hub_server
from tests.run_folders import write
from tests.tiny import make_tiny_model
from tests.training.runs import AtStep, make_data, settings

ID = "someone/tiny-model"

LATER = "89abcdef0123456789abcdef0123456789abcdef"


def files_of(folder: Path, **changes: Any) -> dict[str, bytes]:
    make_tiny_model(folder, layers=2, **changes)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with hub_server() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("MLX_DISTILL_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.delenv("MLX_DISTILL_OFFLINE")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        running.repos[ID] = files_of(tmp_path / "first")
        yield running


def move(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the branch be at another commit; the earlier one is no longer there."""
    monkeypatch.setattr(tests.hub_server, "COMMIT", LATER)
    server.repos[ID] = files_of(tmp_path / "later", seed=3)
    assert resolve(ID).revision == LATER


def run_on(root: Path, model: ModelRecord) -> Path:
    return write(root, model=json.loads(model.model_dump_json()))


@pytest.mark.parametrize("spec", [ID, f"{ID}@main", f"{ID}@{COMMIT}"])
def test_the_base_of_a_run_is_the_commit_that_it_was(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    first = resolve(spec)
    root = run_on(tmp_path / "run", first)
    move(server, tmp_path, monkeypatch)
    base = resolve_base(root, read_run(root))
    assert base == first
    assert (Path(base.path) / "model.safetensors").read_bytes() != server.repos[ID]["model.safetensors"]
    assert resolve_again(first) == first


def test_without_a_copy_it_is_fetched_again(server: HubServer, tmp_path: Path) -> None:
    first = resolve(ID)
    shutil.rmtree(tmp_path / "hub")
    server.fetched.clear()
    root = run_on(tmp_path / "run", first)
    assert resolve_base(root, read_run(root)) == first
    assert "model.safetensors" in server.fetched


def test_a_commit_that_is_gone_is_named_and_no_other_taken(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = run_on(tmp_path / "run", resolve(ID))
    move(server, tmp_path, monkeypatch)
    shutil.rmtree(tmp_path / "hub")
    with pytest.raises(ModelError, match=f"{ID} has no revision {COMMIT}"):
        resolve_base(root, read_run(root))


def test_a_bundled_models_copy_on_the_hub_is_found_by_its_commit(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = replace(BUNDLED["smollm2-135m"], hub_id=ID)
    monkeypatch.setitem(BUNDLED, "tiny", model)
    first = resolve("tiny")
    assert (first.source, first.revision) == ("hub", COMMIT)
    move(server, tmp_path, monkeypatch)
    assert resolve("tiny").revision == LATER
    assert resolve_again(first) == first


def test_a_folder_is_what_it_is_by_now(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", layers=1)
    first = resolve(str(folder))
    shutil.rmtree(folder)
    make_tiny_model(folder, layers=1, seed=3)
    assert resolve_again(first) == resolve(str(folder)) != first
    root = run_on(tmp_path / "run", first)
    with pytest.raises(ModelError, match="is not what it was when"):
        resolve_base(root, read_run(root))


def test_a_run_goes_on_and_is_fused(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_data(tmp_path / "data")
    whole = train(settings(data, Path(ID), tmp_path / "whole"))
    config = settings(data, Path(ID), tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(config, AtStep(3, lambda: signal.raise_signal(signal.SIGINT)))
    move(server, tmp_path, monkeypatch)
    record = train(config)
    assert record.model == whole.model
    assert record.model.revision == COMMIT
    assert (config.run / "adapters.safetensors").read_bytes() == (tmp_path / "whole/adapters.safetensors").read_bytes()
    assert train(config) == record
    fused = fuse(FuseConfig(run=config.run))
    assert fused.base_revision == COMMIT
    assert fused.check is not None
    assert fused.check.passed
    assert train(settings(data, Path(ID), tmp_path / "new")).model.revision == LATER
