"""Pulling: what was shared comes back to the byte and works; what is hostile or damaged leaves nothing behind."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save

from mlx_distill import layout
from mlx_distill.compare.run import compare
from mlx_distill.config import CompareConfig, FuseConfig, PullConfig, ShareConfig
from mlx_distill.errors import ConfigError, InputError, MlxDistillError, ModelError, OccupiedError, ResourceError
from mlx_distill.fuse import fuse
from mlx_distill.run_records import RunRecord
from mlx_distill.runs import read_run
from mlx_distill.share.pull import Pulled, pull
from mlx_distill.share.run import share
from tests.servers.hub_api import TOKEN, Fault, HubApi
from tests.share.conftest import BASE, REPO
from tests.training.runs import Recorder

OTHER = "labs/adapter"
CONFIG = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}


def take(repo: str = REPO, **changes: Any) -> Pulled:
    return pull(PullConfig.model_validate({"repo": repo, **changes}))


def foreign(run: Path, **changes: Any) -> dict[str, bytes]:
    """An adapter as `mlx_lm.lora` leaves it: weights and configuration."""
    settings = {**CONFIG, "model": BASE, **changes}
    return {
        "adapters.safetensors": (run / "adapters.safetensors").read_bytes(),
        "adapter_config.json": json.dumps(settings).encode(),
    }


def left(tmp_path: Path) -> list[str]:
    """What lies where runs are made, hidden or not."""
    return sorted(path.name for path in (tmp_path / "adapters").iterdir() if path.name != "mine")


@pytest.mark.parametrize("what", ["adapter", "both"])
def test_what_was_shared_comes_back_and_is_fused_and_compared(
    hub: HubApi, run: Path, tmp_path: Path, what: str
) -> None:
    share(ShareConfig.model_validate({"run": run, "repo": REPO, "what": what}))
    pulled = take(run=tmp_path / "adapters" / "theirs")
    folder = pulled.folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapters.safetensors",
        "metrics.jsonl",
        "run.json",
    ]
    for name in ("adapters.safetensors", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()
    commit = hub.repos[BASE].commits[-1][0]
    assert pulled.base == f"{BASE}@{commit}"
    mine, theirs = read_run(run), read_run(folder)
    for field in ("identity", "splits", "steps", "valid_loss", "trainable_parameters"):
        assert getattr(theirs, field) == getattr(mine, field)
    fuse(FuseConfig(run=folder))
    expected = load_file(run / "fused" / "model.safetensors")
    found = load_file(folder / "fused" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Add two numbers.\n")
    record = compare(CompareConfig(run=folder, prompts=prompts, max_tokens=3, out=tmp_path / "visuals" / "theirs"))
    assert set(record.models) == {"base", "distilled"}
    # And on to others, as it is.
    again = share(ShareConfig(run=folder, repo="someone/again"))
    assert hub.repos["someone/again"].files["adapters.safetensors"] == (run / "adapters.safetensors").read_bytes()
    assert again.upload is not None


def test_a_revision_is_taken_by_its_commit(hub: HubApi, run: Path, tmp_path: Path) -> None:
    first = hub.put(OTHER, foreign(run))
    hub.put(OTHER, {**foreign(run), "README.md": b"newer"})
    pulled = take(f"{OTHER}@{first}")
    assert pulled.commit == first
    assert pulled.folder == Path("adapters/adapter")
    assert not (tmp_path / "adapters" / "adapter" / "README.md").exists()
    with pytest.raises(ModelError, match="no revision v9"):
        take(f"{OTHER}@v9", run=tmp_path / "adapters" / "x")


def test_an_adapter_of_mlx_lms_becomes_a_run(hub: HubApi, run: Path, tmp_path: Path) -> None:
    hub.put(OTHER, foreign(run))
    pulled = take(OTHER)
    record = read_run(pulled.folder)
    commit = hub.repos[BASE].commits[-1][0]
    assert (record.model.spec, record.model.revision) == (f"{BASE}@{commit}", commit)
    assert record.config["rank"] == 4
    assert record.trainable_parameters == sum(v.size for v in load_file(run / "adapters.safetensors").values())
    fuse(FuseConfig(run=pulled.folder))
    mine, theirs = (load_file(folder / "fused" / "model.safetensors") for folder in (run, pulled.folder))
    assert all((mine[name] == theirs[name]).all() for name in mine)


def test_an_adapter_of_pefts_is_left_for_import(hub: HubApi, run: Path, tmp_path: Path) -> None:
    weights = (run / "adapters.safetensors").read_bytes()
    files = {
        "adapter_model.safetensors": weights,
        "adapter_config.json": json.dumps({"peft_type": "LORA", "base_model_name_or_path": BASE}).encode(),
        "training_args.bin": b"\x80\x04",
    }
    hub.put(OTHER, files)
    pulled = take(OTHER)
    assert (pulled.kind, pulled.folder, pulled.run) == ("peft", Path("adapters/adapter.peft"), Path("adapters/adapter"))
    assert sorted(path.name for path in pulled.folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert (pulled.folder / "adapter_model.safetensors").read_bytes() == weights
    assert not take(OTHER).fresh


def test_the_same_again_is_nothing_to_do_and_another_is_refused(hub: HubApi, run: Path, tmp_path: Path) -> None:
    share(ShareConfig(run=run, repo=REPO))
    target = tmp_path / "adapters" / "theirs"
    assert take(run=target).fresh
    (target / "fused").mkdir()
    before = hub.asked("GET", "/resolve/")
    assert not take(run=target).fresh
    assert (target / "fused").exists()
    assert hub.asked("GET", "/resolve/") == before
    weights = {name: value + 1 for name, value in load_file(run / "adapters.safetensors").items()}
    hub.put(OTHER, {**foreign(run), "adapters.safetensors": save(weights)})
    with pytest.raises(OccupiedError, match="--run"):
        take(OTHER, run=target)
    assert (target / "adapters.safetensors").read_bytes() == (run / "adapters.safetensors").read_bytes()


@pytest.mark.parametrize("inside", ["photo.jpg", ".hidden", "run.json"])
def test_a_folder_of_something_else_is_left_alone(hub: HubApi, run: Path, tmp_path: Path, inside: str) -> None:
    share(ShareConfig(run=run, repo=REPO))
    target = tmp_path / "adapters" / "theirs"
    target.mkdir()
    (target / inside).write_text("precious")
    with pytest.raises(OccupiedError):
        take(run=target)
    assert [(path.name, path.read_text()) for path in target.iterdir()] == [(inside, "precious")]
    (target / inside).unlink()
    assert take(run=target).fresh


# Hostile and damaged repositories


class Runs:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def refused(tmp_path: Path, kind: type[MlxDistillError], match: str) -> str:
    with pytest.raises(kind, match=match) as caught:
        take(OTHER)
    assert left(tmp_path) == []
    assert ".part-" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["../adapters.safetensors", "a/../../x", "/etc/passwd", "..\\x", "C:\\x", "a/..", "x\x1b[2J"],
)
def test_a_name_that_climbs_out_of_its_folder(hub: HubApi, run: Path, tmp_path: Path, name: str) -> None:
    hub.put(OTHER, foreign(run))
    hub.extra_names.append(name)
    said = refused(tmp_path, InputError, "climbs out of its folder")
    assert "\x1b" not in said
    assert hub.asked("GET", "/resolve/") == 0


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapters.npz", "pytorch_model.bin", "x.pkl"])
def test_a_pickle_is_not_taken(hub: HubApi, run: Path, tmp_path: Path, name: str) -> None:
    hub.put(OTHER, {name: pickle.dumps(Runs()), "adapter_config.json": b"{}"})
    refused(tmp_path, ModelError, f"{name}, which can run any code")
    assert hub.asked("GET", "/resolve/") == 0


def test_a_pickle_by_another_name_is_not_loaded(
    hub: HubApi, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.put(OTHER, {**foreign(run), "adapters.safetensors": pickle.dumps(Runs(), protocol=4)})
    refused(tmp_path, InputError, "it is a pickle")
    assert capsys.readouterr().out == ""


def test_only_what_an_adapter_needs_is_taken(hub: HubApi, run: Path, tmp_path: Path) -> None:
    extra = dict.fromkeys(
        ("modeling.py", "x.bin", "notes/run.json", "data/train.jsonl", "fused/model.safetensors"), b"x"
    )
    hub.put(OTHER, {**foreign(run), **extra})
    pulled = take(OTHER)
    assert sorted(path.name for path in pulled.folder.iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
        "run.json",
    ]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"adapters.safetensors": b""}, "not a whole safetensors file"),
        ({"adapters.safetensors": b"\xff" * 100}, "not a whole safetensors file"),
        ({"adapter_config.json": b"{"}, "cannot be read"),
        ({"adapter_config.json": b"[" * 100_000}, "cannot be read"),
        ({"adapter_config.json": b"{}"}, "describes no adapter"),
        ({"adapter_config.json": json.dumps({**CONFIG, "num_layers": 10**9, "model": BASE}).encode()}, "num_layers"),
        (
            {"adapter_config.json": json.dumps({**CONFIG, "model": "/home/me/base"}).encode()},
            "no base model of the Hub",
        ),
        ({"adapter_config.json": json.dumps({**CONFIG, "model": "../../base"}).encode()}, "no base model of the Hub"),
        ({"adapter_config.json": json.dumps(CONFIG).encode()}, "no base model of the Hub"),
        ({"run.json": b"{}"}, r"labs/adapter/run\.json"),
        ({"run.json": b"\xff\xfe"}, r"labs/adapter/run\.json"),
        ({"metrics.jsonl": b"{}\n"}, r"labs/adapter/metrics\.jsonl:1"),
    ],
)
def test_damage_leaves_nothing_behind(
    hub: HubApi, run: Path, tmp_path: Path, changes: dict[str, bytes], match: str
) -> None:
    hub.put(OTHER, {**foreign(run), **changes})
    refused(tmp_path, InputError, match)


@pytest.mark.parametrize(
    "model",
    [
        {"spec": "/home/me/base", "source": "folder", "path": "/home/me/base"},
        {"spec": "../base", "source": "hub"},
        {"spec": "base.gguf", "source": "gguf"},
    ],
)
def test_a_record_of_a_base_that_is_not_on_the_hub(
    hub: HubApi, run: Path, tmp_path: Path, model: dict[str, str]
) -> None:
    record = json.loads((run / "run.json").read_text())
    record["model"] |= model
    hub.put(OTHER, {**foreign(run), "run.json": json.dumps(record).encode()})
    refused(tmp_path, InputError, "not the record of a finished run on a model of the Hub")


def test_places_in_a_foreign_record_are_not_kept(hub: HubApi, run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    record["config"]["data"] = "/etc"
    record["model"]["path"] = "/etc/passwd"
    hub.put(OTHER, {**foreign(run), "run.json": json.dumps(record).encode()})
    found = layout.read_record(take(OTHER).folder / "run.json", RunRecord)
    assert (found.config["data"], found.model.path) == ("etc", "")


def test_another_content_than_the_hub_lists(hub: HubApi, run: Path, tmp_path: Path) -> None:
    files = foreign(run)
    hub.put(OTHER, files)
    weights = bytearray(files["adapters.safetensors"])
    weights[-1] ^= 1
    hub.replaced["adapters.safetensors"] = bytes(weights)
    refused(tmp_path, InputError, "another file than the Hub lists")


@pytest.mark.parametrize("name", ["adapter_config.json", "run.json"])
def test_a_text_of_many_megabytes(hub: HubApi, run: Path, tmp_path: Path, name: str) -> None:
    hub.put(OTHER, {**foreign(run), name: b" " * (17 << 20)})
    refused(tmp_path, InputError, f"{name} has 17,825,792 bytes")
    assert hub.asked("GET", "/resolve/") == 0


def test_too_little_disk(hub: HubApi, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put(OTHER, foreign(run))
    monkeypatch.setattr(layout.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    refused(tmp_path, ResourceError, OTHER)


def test_a_whole_model_is_no_adapter(hub: HubApi, run: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a whole model, and no adapter"):
        take(BASE)
    assert left(tmp_path) == []


def test_an_empty_repository(hub: HubApi, run: Path, tmp_path: Path) -> None:
    hub.put(OTHER, {".gitattributes": b""})
    refused(tmp_path, ModelError, "holds no adapter")


# Faults of the Hub


@pytest.mark.parametrize(
    ("status", "code", "match"),
    [
        (401, "", "not let you in"),
        (403, "GatedRepo", "accepted its terms"),
        (404, "RepoNotFound", "has no model"),
        (418, "", "answered 418"),
    ],
)
def test_faults_say_what_to_do(
    hub: HubApi, run: Path, tmp_path: Path, waits: list[float], status: int, code: str, match: str
) -> None:
    hub.put(OTHER, foreign(run))
    hub.faults.append(Fault("GET", "/api/models/", status, times=9, headers={"X-Error-Code": code} if code else {}))
    refused(tmp_path, ModelError, match)
    assert waits == []


@pytest.mark.parametrize(("method", "path"), [("GET", "/api/models/"), ("HEAD", "/resolve/"), ("GET", "/resolve/")])
@pytest.mark.parametrize("status", [429, 500, 0])
def test_what_passes_is_waited_for(
    hub: HubApi, run: Path, waits: list[float], method: str, path: str, status: int
) -> None:
    hub.put(OTHER, foreign(run))
    hub.faults.append(Fault(method, path, status, times=2))
    told = Recorder()
    pulled = pull(PullConfig(repo=OTHER), told)
    assert (pulled.folder / "adapters.safetensors").read_bytes() == (run / "adapters.safetensors").read_bytes()
    assert hub.faults[0].times == 0
    assert waits == [1, 2]
    assert len(told.said) == 2


def test_patience_has_an_end(hub: HubApi, run: Path, tmp_path: Path, waits: list[float]) -> None:
    hub.put(OTHER, foreign(run))
    hub.faults.append(Fault("GET", "/resolve/", 500, times=99))
    refused(tmp_path, ModelError, "6 times in a row")


def test_offline_says_so(hub: HubApi, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DISTILL_OFFLINE", "1")
    refused(tmp_path, ModelError, "MLX_DISTILL_OFFLINE")
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["mine", "../mine", "a/b/c", "someone/..", "", "/etc/passwd", "a/b@"])
def test_a_name_that_is_none_is_refused(hub: HubApi, repo: str) -> None:
    with pytest.raises(ConfigError, match="is not a name of the Hub"):
        take(repo)
    assert hub.requests == []


def test_a_private_repository_opens_to_its_token(hub: HubApi, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put(OTHER, foreign(run), private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ModelError, match="or it is private"):
        take(OTHER)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert take(OTHER).fresh
