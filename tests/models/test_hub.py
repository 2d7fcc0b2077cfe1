"""Models from the Hub: what is fetched, what is kept, and what a user is told when it fails."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest

from mlx_distill import layout
from mlx_distill.errors import ModelError, ResourceError
from mlx_distill.models import hub
from mlx_distill.models.resolve import resolve, resolve_here
from mlx_distill.progress import Bar, Progress
from tests.hub_server import COMMIT, HubServer, hub_server
from tests.tiny import make_tiny_model

ID = "someone/tiny-model"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = make_tiny_model(tmp_path_factory.mktemp("hub") / "model", layers=1)
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    found["README.md"] = b"---\nlanguage: en\nlicense: apache-2.0\n---\n# Tiny\n"
    return found


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
        yield running


class Told(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_download_is_recorded_and_reused(server: HubServer, files: dict[str, bytes]) -> None:
    server.repos[ID] = files
    record = resolve(ID)
    assert (record.source, record.name, record.revision, record.licence) == ("hub", "tiny-model", COMMIT, "apache-2.0")
    assert (Path(record.path) / "model.safetensors").read_bytes() == files["model.safetensors"]
    server.fetched.clear()
    assert resolve(ID) == record
    assert server.fetched == []


def test_only_weights_and_text_are_fetched(server: HubServer, files: dict[str, bytes]) -> None:
    unwanted = ["modeling.py", "pytorch_model.bin", "model.pt", "onnx/model.safetensors", "consolidated.safetensors"]
    server.repos[ID] = {**files, **dict.fromkeys(unwanted, b"x")}
    record = resolve(ID)
    assert sorted(server.fetched) == sorted(files)
    assert sorted(path.name for path in Path(record.path).iterdir()) == sorted(files)


def test_whole_commit_in_the_cache_needs_no_word_with_the_hub(server: HubServer, files: dict[str, bytes]) -> None:
    server.repos[ID] = files
    first = resolve(f"{ID}@{COMMIT}")
    server.fault = (500, "")
    assert resolve(f"{ID}@{COMMIT}") == first


def test_what_is_here_is_found_without_a_word_with_the_hub(server: HubServer, files: dict[str, bytes]) -> None:
    server.repos[ID] = files
    assert resolve_here(ID) is resolve_here(f"{ID}@{COMMIT}") is None
    assert server.fetched == []
    first = resolve(ID)
    server.repos.clear()
    server.fault = (500, "")
    found = resolve_here(ID)
    assert found is not None and (found.path, found.revision) == (first.path, COMMIT)
    assert resolve_here(f"{ID}@main") == found
    assert resolve_here(f"{ID}@other") is None


@pytest.mark.parametrize("variable", ["MLX_DISTILL_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_uses_the_cache_or_says_so(
    server: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    server.repos[ID] = files
    first = resolve(ID)
    monkeypatch.setenv(variable, "1")
    server.fault = (500, "")
    assert resolve(ID) == first
    with pytest.raises(ModelError, match=f"other/model is not in the Hub's cache.*{variable}"):
        resolve("other/model")


@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        ((404, "RepoNotFound"), "has no model someone/tiny-model", "hf auth login"),
        ((401, ""), "not let you in to someone/tiny-model", "hf auth login"),
        ((403, "GatedRepo"), "accepted its terms", "huggingface.co/someone/tiny-model"),
        ((418, ""), "answered 418", "Try again"),
    ],
)
def test_faults_say_what_to_do(server: HubServer, fault: tuple[int, str], message: str, hint: str) -> None:
    server.fault = fault
    with pytest.raises(ModelError, match=message) as caught:
        resolve(ID)
    assert hint in str(caught.value)
    assert "smollm2-135m" in str(caught.value)


def test_nobody_listens(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="could not be reached"):
        resolve(ID)


def test_a_copy_in_the_cache_serves_when_the_hub_refuses(server: HubServer, files: dict[str, bytes]) -> None:
    server.repos[ID] = files
    first = resolve(ID)
    server.fault = (403, "GatedRepo")
    told = Told()
    assert resolve(ID, progress=told) == first
    assert any("in the cache" in line for line in told.lines)


def test_unknown_revision(server: HubServer, files: dict[str, bytes]) -> None:
    server.repos[ID] = files
    with pytest.raises(ModelError, match="no revision v9"):
        resolve(f"{ID}@v9")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "tiny.Q4_K_M.gguf"])
def test_without_safetensors_nothing_is_fetched(server: HubServer, files: dict[str, bytes], name: str) -> None:
    server.repos[ID] = {"config.json": files["config.json"], name: b"x"}
    with pytest.raises(ModelError, match=f"no weights in safetensors; it holds {name}"):
        resolve(ID)
    assert server.fetched == []


def test_a_broken_download_goes_on_later(
    server: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.file_download.time, "sleep", lambda _: None)
    server.repos[ID] = files
    server.cut = {"model.safetensors": 1000}
    with pytest.raises(ModelError, match=ID):
        resolve(ID)
    assert hub.cached(ID, COMMIT) is None
    server.cut = {}
    record = resolve(ID)
    assert (Path(record.path) / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_half_a_copy_is_not_taken_for_a_whole_one(server: HubServer, files: dict[str, bytes]) -> None:
    server.repos[ID] = files
    folder = Path(resolve(ID).path)
    (folder / "tokenizer.json").unlink()
    assert hub.cached(ID) is None
    assert (Path(resolve(ID).path) / "tokenizer.json").is_file()


def test_too_little_disk(server: HubServer, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    server.repos[ID] = files
    monkeypatch.setattr(layout.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(ResourceError, match=ID):
        resolve(ID)
    assert server.fetched == []


def test_near_names_are_offered(server: HubServer, files: dict[str, bytes]) -> None:
    server.repos[ID] = files
    resolve(ID)
    with pytest.raises(ModelError, match=r"No folder of that name") as caught:
        resolve("someone/tiny-modle")
    assert f"Did you mean {ID}" in str(caught.value)


def test_progress_counts_the_bytes(server: HubServer, files: dict[str, bytes]) -> None:
    seen: list[float] = []
    totals: list[float | None] = []

    class Counting(Progress):
        @contextmanager
        def task(self, title: str, total: float | None = None, *, unit: str = "") -> Iterator[Bar]:
            class Counter(Bar):
                def advance(self, amount: float = 1, **fields: str) -> None:
                    seen.append(amount)

            totals.append(total)
            yield Counter()

    server.repos[ID] = files
    resolve(ID, progress=Counting())
    assert totals == [round(sum(map(len, files.values())) / 1e6, 1)]
    assert sum(seen) * 1e6 == pytest.approx(sum(map(len, files.values())))
