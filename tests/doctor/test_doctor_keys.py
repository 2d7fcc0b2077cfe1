"""The doctor and keys: whether they are set is told, and nothing else of them."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import huggingface_hub.constants
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distill.doctor import access
from tests.doctor.calling import doctor, found, process

SECRET = "sk-Zq7-very-secret-0xC0FFEE"

#: What an environment variable can hold.
KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_output_does_not_depend_on_the_keys(
    quick: None, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Whatever a key is, the output is the same to the byte: so it tells nothing of it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("ANTHROPIC_API_KEY", "a")
    monkeypatch.setenv("HF_TOKEN", "b")
    expected = doctor(*arguments)
    assert expected.exit_code == 0

    @settings(max_examples=25, deadline=None)
    @given(KEYS, KEYS, st.binary(min_size=1).filter(bytes.strip))
    def check(key: str, token: str, stored: bytes) -> None:
        (tmp_path / "token").write_bytes(stored)
        if key.strip().isascii() and key.strip().isprintable() and " " not in key.strip():
            monkeypatch.setenv("ANTHROPIC_API_KEY", key)
        monkeypatch.setenv("HF_TOKEN", token)
        assert doctor(*arguments).output == expected.output
        monkeypatch.delenv("HF_TOKEN")
        assert doctor(*arguments).output == expected.output

    check()


@given(KEYS)
def test_anthropic_key_is_set_or_not_set_and_nothing_else(key: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANTHROPIC_API_KEY", key)
        [finding] = access.anthropic_key()
        assert finding.found == "set"
        # What no key can hold is told by kind: one of two fixed sentences, whatever the key.
        assert finding.state in ("ok", "warning")
        patch.setenv("ANTHROPIC_API_KEY", "a b" if finding.state == "warning" else "ab")
        assert access.anthropic_key() == [finding]


def test_no_secret_in_the_output_of_a_whole_run(tmp_path: Path) -> None:
    """The real command, with faults whose messages might quote a key: a token file, a Hub that refuses, an address
    with a password in it."""
    (tmp_path / "token").write_bytes(SECRET.encode() + b"\xff")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        environment = {
            **{key: value for key, value in os.environ.items() if not key.endswith("_OFFLINE")},
            "ANTHROPIC_API_KEY": f"{SECRET} \n {SECRET}",
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "NO_PROXY": "127.0.0.1",
            "HF_ENDPOINT": f"http://{SECRET}:{SECRET}@127.0.0.1:{port}",
        }
        for arguments in (["--json"], []):
            done = process("-m", "mlx_distill", "doctor", "--no-speed", *arguments, environment=environment)
            assert done.returncode == 0, done.stderr
            assert f"127.0.0.1:{port} cannot be reached" in done.stdout
            assert "secret" not in (done.stdout + done.stderr).lower()


def test_keys_that_are_not_set_come_with_their_command(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ANTHROPIC_API_KEY", " \n")
    assert (found("HF_TOKEN").state, found("HF_TOKEN").found) == ("missing", "not set")
    assert "hf auth login" in (found("HF_TOKEN").remedy or "")
    assert (found("ANTHROPIC_API_KEY").state, found("ANTHROPIC_API_KEY").found) == ("missing", "not set")
    assert "export ANTHROPIC_API_KEY=" in (found("ANTHROPIC_API_KEY").remedy or "")
    assert doctor().exit_code == 0  # nothing necessary
