"""Sharing with a Hub that fails: what passes is waited for, what does not is told, and nothing is sent twice."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import get_session

from mlx_distill import layout
from mlx_distill.config import ShareConfig
from mlx_distill.errors import ModelError
from mlx_distill.progress import Bar, Progress
from mlx_distill.share import upload as upload_module
from mlx_distill.share.run import share
from tests.servers.hub_api import Fault, HubApi
from tests.share.conftest import REPO, publish, rewrite
from tests.training.runs import Recorder


def test_without_a_token_it_says_how_to_log_in(hub: HubApi, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ModelError, match="no token") as caught:
        publish(run)
    assert "hf auth login" in str(caught.value)
    assert hub.requests == []


def test_a_token_that_is_not_known(hub: HubApi, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_yesterday")
    with pytest.raises(ModelError, match="does not know your token") as caught:
        publish(run)
    assert "hf_of_yesterday" not in str(caught.value)
    assert REPO not in hub.repos


def test_a_namespace_of_another(hub: HubApi, run: Path) -> None:
    with pytest.raises(ModelError, match=r"may not write to other/mine.*rights"):
        publish(run, repo="other/mine")


@pytest.mark.parametrize("offline", ["MLX_DISTILL_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_says_so(hub: HubApi, run: Path, monkeypatch: pytest.MonkeyPatch, offline: str) -> None:
    monkeypatch.setenv(offline, "1")
    with pytest.raises(ModelError, match=offline):
        publish(run)
    assert hub.requests == []


STEPS = [
    ("GET", "/api/models/"),
    ("POST", "/api/repos/create"),
    ("POST", "/preupload/"),
    ("POST", "/objects/batch"),
    ("PUT", "/lfs/"),
    ("POST", "/api/validate-yaml"),
    ("POST", "/commit/"),
]


@pytest.mark.parametrize(("method", "path"), STEPS)
@pytest.mark.parametrize("status", [429, 500, 503, 0])
@pytest.mark.parametrize("large", [1, 10**9])
def test_what_passes_is_waited_for(
    hub: HubApi,
    run: Path,
    waits: list[float],
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    path: str,
    status: int,
    large: int,
) -> None:
    monkeypatch.setattr(upload_module, "LARGE", large)
    hub.faults.append(Fault(method, path, status, times=2, headers={"Retry-After": "7"} if status == 429 else {}))
    told = Recorder()
    share(ShareConfig(run=run, repo=REPO), told)
    assert hub.faults[0].times == 0
    assert waits == ([7, 7] if status == 429 else [1, 2])
    assert len([line for line in told.said if "trying again" in line]) == 2
    assert hub.repos[REPO].messages == ["initial commit", "Publish mine with mlx-distill"]
    assert hub.repos[REPO].files["adapters.safetensors"] == (run / "adapters.safetensors").read_bytes()


def test_a_commit_whose_answer_was_lost_is_not_made_twice(hub: HubApi, run: Path, waits: list[float]) -> None:
    publish(run)
    known = hub.repos[REPO].commits[-1][0]
    rewrite(run, device="Another")
    original = hub.repos[REPO].commit

    def commit_and_break(files: dict[str, bytes], message: str) -> str:
        original(files, message)
        hub.repos[REPO].commit = original  # type: ignore[method-assign]
        raise ConnectionError

    hub.repos[REPO].commit = commit_and_break  # type: ignore[method-assign]
    sent = publish(run).upload
    assert sent is not None
    assert sent.changed
    assert len(hub.repos[REPO].commits) == 3
    assert sent.commit == hub.repos[REPO].commits[-1][0] != known
    assert len(waits) == 1


REFUSED = [(401, "does not know your token"), (403, "may not write"), (404, "the Hub has no"), (418, "answered 418")]


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    # A repository that is not there is made.
    [(*step, *refused) for step in STEPS for refused in REFUSED if (step[0], refused[0]) != ("GET", 404)],
)
def test_what_does_not_pass_is_told_at_once(
    hub: HubApi, run: Path, waits: list[float], method: str, path: str, status: int, message: str
) -> None:
    hub.faults.append(Fault(method, path, status, times=99))
    with pytest.raises(ModelError, match=message) as caught:
        publish(run)
    assert caught.value.hint
    assert waits == []
    assert "Traceback" not in str(caught.value)
    assert REPO not in hub.repos or len(hub.repos[REPO].commits) == 1


def test_patience_has_an_end(hub: HubApi, run: Path, waits: list[float]) -> None:
    hub.faults.append(Fault("POST", "/commit/", 500, times=99))
    with pytest.raises(ModelError, match="answers 500, 6 times in a row") as caught:
        publish(run)
    assert "same command" in str(caught.value)
    assert waits == [1, 2, 4, 8, 16]


def test_a_day_is_not_waited(hub: HubApi, run: Path, waits: list[float]) -> None:
    hub.faults.append(Fault("POST", "/commit/", 429, times=99, headers={"Retry-After": "86400"}))
    with pytest.raises(ModelError, match="asks to wait 86,400 s"):
        publish(run)
    assert waits == []


def test_the_end_of_a_rate_limit_is_waited_for(hub: HubApi, run: Path, waits: list[float]) -> None:
    headers = {"RateLimit": '"api";r=0;t=33', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'}
    hub.faults.append(Fault("POST", "/commit/", 429, headers=headers))
    publish(run)
    assert waits == [33]


def test_a_cut_upload_goes_on_with_what_is_missing(
    hub: HubApi, run: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused model arrives, the adapter breaks off: the second command sends the adapter alone."""
    monkeypatch.setattr(upload_module, "LARGE", 1000)
    adapter = layout.file_sha256(run / "adapters.safetensors")
    model = layout.file_sha256(run / "fused" / "model.safetensors")
    hub.faults.append(Fault("PUT", f"/lfs/{adapter}", 0, times=99, read=500))
    publish(run, what="fused")
    hub.received.clear()
    with pytest.raises(ModelError, match=r"Uploading adapter/adapters\.safetensors: the Hub broke") as caught:
        publish(run, what="both")
    assert "not sent again" in str(caught.value)
    assert (adapter not in hub.objects) and (model in hub.objects)
    assert "adapter/adapters.safetensors" not in hub.repos[REPO].files
    assert hub.received == []
    hub.faults.clear()
    publish(run, what="both")
    assert [name for name, size in hub.received if len(name) == 64] == [adapter]
    assert hub.repos[REPO].files["adapter/adapters.safetensors"] == (run / "adapters.safetensors").read_bytes()


def test_an_object_that_arrived_before_the_failure_is_not_sent_again(
    hub: HubApi, run: Path, waits: list[float]
) -> None:
    hub.faults.append(Fault("POST", "/commit/", 500, times=99))
    with pytest.raises(ModelError):
        publish(run)
    assert [size for name, size in hub.received] == [(run / "adapters.safetensors").stat().st_size]
    assert len(hub.repos[REPO].commits) == 1
    hub.faults.clear()
    hub.received.clear()
    publish(run)
    assert all(len(name) != 64 for name, _ in hub.received)
    assert "adapters.safetensors" in hub.repos[REPO].files


def test_progress_counts_each_byte_once(
    hub: HubApi, run: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[float]] = {}
    totals: dict[str, float | None] = {}

    class Counting(Progress):
        @contextmanager
        def task(self, title: str, total: float | None = None, *, unit: str = "") -> Any:
            class Counter(Bar):
                def advance(self, amount: float = 1, **fields: str) -> None:
                    seen.setdefault(title, []).append(amount)

            totals[title] = total
            yield Counter()

    monkeypatch.setattr(upload_module, "LARGE", 1)
    # Broken off in the middle once: what was sent twice is counted once.
    hub.faults.append(Fault("PUT", "/lfs/", 0, times=1, read=2000))
    shared = share(ShareConfig(run=run, repo=REPO, what="both"), Counting())
    title = f"Uploading to {REPO}"
    assert sum(seen[title]) * 1e6 == pytest.approx(shared.bytes)
    assert totals[title] == round(shared.bytes / 1e6, 1)


def test_nobody_listens(hub: HubApi, run: Path, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="could not be reached"):
        publish(run)
    assert len(waits) == 5


def test_the_library_is_left_as_it_was(hub: HubApi, run: Path) -> None:
    before = type(get_session())
    publish(run)
    assert type(get_session()) is before
    hub.faults.append(Fault("POST", "/commit/", 418, times=99))
    rewrite(run, device="Another")
    with pytest.raises(ModelError):
        publish(run)
    assert type(get_session()) is before
