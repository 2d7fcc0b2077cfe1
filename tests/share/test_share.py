"""Sharing: what arrives, once and in one commit; what goes wrong on the way; and what a second try sends."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard

from mlx_distill.config import ShareConfig
from mlx_distill.errors import ConfigError, InputError, ModelError
from mlx_distill.run_records import RunRecord
from mlx_distill.share.run import share
from tests.servers.hub_api import HubApi
from tests.share.conftest import BASE, REPO, Trained, make_comparison, manifest, publish, rewrite
from tests.training.runs import Recorder


def test_a_new_repository_is_private_and_holds_the_adapter(hub: HubApi, run: Path) -> None:
    shared = publish(run)
    repo = hub.repos[REPO]
    assert repo.private
    assert repo.messages == ["initial commit", "Publish mine with mlx-distill"]
    assert sorted(repo.files) == [
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapters.safetensors",
        "metrics.jsonl",
        "run.json",
    ]
    assert repo.files["adapters.safetensors"] == (run / "adapters.safetensors").read_bytes()
    assert repo.files["metrics.jsonl"] == (run / "metrics.jsonl").read_bytes()
    assert json.loads(repo.files["adapter_config.json"])["model"] == BASE
    sent = shared.upload
    assert sent is not None
    assert (sent.commit, sent.private, sent.created, sent.changed) == (repo.commits[-1][0], True, True, True)
    assert sent.url == f"{hub.url}/{REPO}"
    assert {file.name: file.size for file in shared.files} == {
        name: len(data) for name, data in repo.files.items() if name != ".gitattributes"
    }


def test_public_is_public_only_where_it_is_said(hub: HubApi, run: Path) -> None:
    sent = publish(run, public=True).upload
    assert sent is not None
    assert not sent.private
    assert not hub.repos[REPO].private


def test_what_is_published_says_nothing_of_this_machine(
    hub: HubApi, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    home = str(tmp_path)
    rewrite(
        run,
        config={"data": f"{home}/secret-client/rows", "run": f"{home}/adapters/mine", "model": f"{home}/models/base"},
        manifest=manifest(f"recorded:{home}/answers"),
    )
    config = json.loads((run / "fused" / "config.json").read_text())
    (run / "fused" / "config.json").write_text(json.dumps({**config, "_name_or_path": f"{home}/models/base"}))
    make_comparison(tmp_path / "visuals" / "mine", run)
    publish(run, what="both")
    for name, data in hub.repos[REPO].files.items():
        assert home.encode() not in data, name
        assert b"secret-client" not in data, name
        assert str(trained.run.parents[1]).encode() not in data, name
        assert b"/Users/somebody" not in data, name
        assert b"/home/somebody" not in data, name
    record = RunRecord.model_validate_json(hub.repos[REPO].files["run.json"])
    assert record.manifest is not None
    assert record.manifest.teacher == "recorded:answers"
    assert record.config["data"] == "rows"
    assert record.model.spec == f"{BASE}@{hub.repos[BASE].commits[-1][0]}"
    assert json.loads(hub.repos[REPO].files["config.json"]) == {**config, "_name_or_path": "base"}


def test_a_whole_model_lies_at_the_root_and_the_adapter_beside_it(hub: HubApi, run: Path) -> None:
    publish(run, what="both")
    files = hub.repos[REPO].files
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert files[name] == (run / "fused" / name).read_bytes()
    assert files["adapter/adapters.safetensors"] == (run / "adapters.safetensors").read_bytes()
    # transformers would take it for PEFT's.
    assert "adapter_config.json" not in files
    publish(run, what="fused", repo="someone/whole")
    assert "adapter/adapters.safetensors" not in hub.repos["someone/whole"].files
    assert hub.repos["someone/whole"].files["model.safetensors"] == files["model.safetensors"]


@pytest.mark.parametrize("what", ["fused", "both"])
def test_what_lies_at_the_root_is_what_loaders_take(hub: HubApi, run: Path, tmp_path: Path, what: str) -> None:
    """mlx-lm and transformers, the latter with peft installed, which takes an adapter's configuration for its own."""
    publish(run, what=what)
    folder = tmp_path / "downloaded"
    for name, data in hub.repos[REPO].files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    tokens = [[5, 17, 300, 42, 8]]
    model, _ = mlx_lm.load(str(folder))[:2]
    found = np.array(model(mx.array(tokens)))
    expected, _ = mlx_lm.load(str(run / "fused"))[:2]
    assert np.array_equal(found, np.array(expected(mx.array(tokens))))
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = reference(torch.tensor(tokens)).logits.numpy()
    assert np.abs(logits - found).max() < 1e-3
    assert transformers.AutoTokenizer.from_pretrained(folder).chat_template


def test_mlx_lm_takes_the_adapter_as_it_was_published(hub: HubApi, run: Path, tmp_path: Path, trained: Trained) -> None:
    publish(run)
    folder, base = tmp_path / "downloaded", tmp_path / "base"
    for place, files in ((folder, hub.repos[REPO].files), (base, trained.base)):
        place.mkdir()
        for name, data in files.items():
            (place / name).write_bytes(data)
    tokens = mx.array([[5, 17, 300, 42, 8]])
    found, _ = mlx_lm.load(str(base), adapter_path=str(folder))[:2]
    expected, _ = mlx_lm.load(str(run / "fused"))[:2]
    assert np.abs(np.array(found(tokens)) - np.array(expected(tokens))).max() < 1e-4


def test_a_second_time_nothing_is_sent_and_no_commit_is_made(hub: HubApi, run: Path) -> None:
    first = publish(run).upload
    hub.received.clear()
    again = publish(run).upload
    assert first is not None
    assert again is not None
    assert (again.commit, again.changed, again.created) == (first.commit, False, False)
    assert hub.received == []
    assert len(hub.repos[REPO].commits) == 2


def test_an_update_is_one_commit_and_takes_away_what_is_ours_alone(hub: HubApi, run: Path) -> None:
    publish(run, what="both")
    files = {**hub.repos[REPO].files, "photo.jpg": b"mine", "notes/run.json": b"mine", "LICENSE": b"free"}
    hub.put(REPO, files)
    before = len(hub.repos[REPO].commits)
    sent = publish(run).upload
    assert sent is not None
    assert len(hub.repos[REPO].commits) == before + 1
    now = hub.repos[REPO].files
    assert {"photo.jpg", "notes/run.json", "LICENSE", "adapters.safetensors"} <= now.keys()
    assert "model.safetensors" not in now
    assert "adapter/adapters.safetensors" not in now
    assert set(sent.removed) == files.keys() - now.keys()


def test_a_dry_run_asks_nobody_and_shows_all(hub: HubApi, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    before = sorted(path for path in run.rglob("*"))
    shown = publish(run, dry_run=True)
    assert hub.requests == []
    assert shown.upload is None
    assert sorted(path for path in run.rglob("*")) == before
    assert shown.card.startswith("---\n")
    assert {file.name for file in shown.files} >= {"README.md", "adapters.safetensors"}


def test_what_a_dry_run_shows_is_what_is_sent(hub: HubApi, run: Path) -> None:
    shown = publish(run, dry_run=True, what="both")
    sent = publish(run, what="both")
    assert [(f.name, f.size, f.sha256) for f in shown.files] == [(f.name, f.size, f.sha256) for f in sent.files]
    assert shown.card.encode() == hub.repos[REPO].files["README.md"]


# What the repository may be


def test_a_public_repository_is_not_written_to_unless_it_is_said(hub: HubApi, run: Path) -> None:
    hub.put(REPO, {"README.md": b"hello"})
    with pytest.raises(ModelError, match="is public") as caught:
        publish(run)
    assert "--public" in str(caught.value)
    assert len(hub.repos[REPO].commits) == 1
    assert hub.received == []
    publish(run, public=True)
    assert "adapters.safetensors" in hub.repos[REPO].files


def test_a_private_repository_stays_so(hub: HubApi, run: Path) -> None:
    hub.put(REPO, {".gitattributes": b""}, private=True)
    told = Recorder()
    share(ShareConfig(run=run, repo=REPO, public=True), told)
    assert hub.repos[REPO].private
    assert any("stays so" in line for line in told.said)


def test_another_model_is_not_written_over(hub: HubApi, run: Path) -> None:
    hub.put(REPO, {"README.md": b"hello", "model.safetensors": b"precious"}, private=True)
    with pytest.raises(ModelError, match=r"holds model\.safetensors"):
        publish(run)
    assert hub.repos[REPO].files["model.safetensors"] == b"precious"


@pytest.mark.parametrize("repo", ["mine", "../mine", "a/b/c", "someone/mine@v1", "someone/..", "some one/mine", ""])
def test_a_name_that_is_none_is_refused(hub: HubApi, run: Path, repo: str) -> None:
    with pytest.raises(ConfigError, match="names no repository"):
        publish(run, repo=repo)
    assert hub.requests == []


def test_the_card_is_one_that_the_hub_reads(hub: HubApi, run: Path) -> None:
    publish(run)
    card = ModelCard(hub.repos[REPO].files["README.md"].decode())
    assert card.data.base_model == BASE
    assert card.data.library_name == "mlx"
    assert card.data.license == "apache-2.0"


def test_an_unfinished_run_is_not_published(hub: HubApi, run: Path) -> None:
    rewrite(run, status="running")
    with pytest.raises(InputError, match="not finished"):
        publish(run)
    assert hub.requests == []
    (run / "run.json").unlink()
    with pytest.raises(InputError, match="no such file"):
        publish(run)
