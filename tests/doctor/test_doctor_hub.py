"""The doctor asks the Hub, and looks for the bundled student."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import pytest

from mlx_distill.doctor import access
from mlx_distill.doctor.finding import Finding
from tests.doctor.calling import found
from tests.hub_server import hub_server


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLX_DISTILL_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    # What a machine's own proxy says is not what is tested.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@contextmanager
def _server(reply: bytes | None) -> Iterator[str]:
    """A server of few words: it says `reply`, or nothing at all, and waits until the client goes."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            if reply is not None:
                connection.sendall(reply)
                connection.shutdown(socket.SHUT_WR)
            connection.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(5)


def test_hub_answers_even_if_it_lacks_the_model(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url + "/")
        assert access.hub() == [Finding("Hub", "ok", f"{server.url.removeprefix('http://')} answers")]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_hub_with_a_fault(online: None, monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    with hub_server() as server:
        server.fault = (status, "")
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        [finding] = access.hub()
    assert finding.state == "warning"
    assert finding.found.endswith(f"answers {status}")
    assert "HF_ENDPOINT" in (finding.remedy or "")


def test_login_page_of_a_network_is_no_hub(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with _server(b"HTTP/1.1 200 OK\r\nContent-Length: 13\r\n\r\n<html></html>") as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        [finding] = access.hub()
    assert finding.state == "warning"
    assert finding.found.endswith("answers 200, but not as a Hub does")


def test_hub_that_says_nothing(online: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_HUB_SECONDS", 0.2)
    with _server(None) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        [finding] = access.hub()
    assert (finding.state, finding.found.partition(" ")[2]) == ("warning", "does not answer within 0.2 s")


@pytest.mark.parametrize("address", ["nonsense", "ftp://host", "http://", "https://[::1", "http://a:b@h:port", "://"])
def test_address_that_is_none(online: None, monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    assert access.hub() == [
        Finding("Hub", "warning", "HF_ENDPOINT is not the address of a server", "unset HF_ENDPOINT")
    ]


@pytest.mark.parametrize("variable", ["MLX_DISTILL_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_means_that_the_hub_is_not_asked(online: None, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{listener.getsockname()[1]}")
        [finding] = access.hub()
        listener.settimeout(0.1)
        with pytest.raises(TimeoutError):
            listener.accept()
    assert finding.state == "warning"
    assert finding.found.startswith("not asked")
    assert variable in (finding.remedy or "")


def test_student(quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mlx_distill.models.bundled import BUNDLED
    from mlx_distill.models.gguf import cached_folder

    monkeypatch.setenv("MLX_DISTILL_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    student = found("smollm2-135m")
    assert (student.state, student.required) == ("missing", False)
    assert "mlx-distill demo" in (student.remedy or "")
    cached_folder(BUNDLED["smollm2-135m"].sha256).mkdir(parents=True)
    assert found("smollm2-135m") == Finding("smollm2-135m", "ok", "here")
