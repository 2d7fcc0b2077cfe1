"""Keys come from the environment or the keyring, and go nowhere else, whatever a server says and whatever breaks."""

from __future__ import annotations

import json
import logging
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from mlx_distill.cli.main import main
from mlx_distill.errors import TeacherUnavailableError
from mlx_distill.teachers.keys import SERVICE, find_key
from tests.servers import messages_server
from tests.servers.messages_server import MODEL, Fault, MessagesServer

VARIABLE = "ANTHROPIC_API_KEY"


@pytest.fixture
def keyring(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A keyring of the test's own: name → key. It is locked where it holds a key for "locked"."""
    held: dict[str, str] = {}
    module, errors = types.ModuleType("keyring"), types.ModuleType("keyring.errors")
    problem = type("KeyringError", (Exception,), {})

    def get_password(service: str, name: str) -> str | None:
        if "locked" in held:
            raise problem
        return held.get(name) if service == SERVICE else None

    vars(module)["get_password"] = get_password
    vars(errors)["KeyringError"] = problem
    monkeypatch.setitem(sys.modules, "keyring", module)
    monkeypatch.setitem(sys.modules, "keyring.errors", errors)
    return held


def test_the_environment_comes_first(monkeypatch: pytest.MonkeyPatch, keyring: dict[str, str]) -> None:
    keyring[VARIABLE] = "from-the-keyring"
    monkeypatch.setenv(VARIABLE, "from-the-environment")
    assert find_key(VARIABLE) == "from-the-environment"
    monkeypatch.setenv(VARIABLE, " ")
    assert find_key(VARIABLE) == "from-the-keyring"
    assert find_key("ANOTHER_KEY") is None


def test_a_locked_keyring_holds_nothing(monkeypatch: pytest.MonkeyPatch, keyring: dict[str, str]) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    keyring |= {VARIABLE: "x", "locked": "x"}
    assert find_key(VARIABLE) is None


def test_a_broken_key_of_the_keyring_is_not_repeated(monkeypatch: pytest.MonkeyPatch, keyring: dict[str, str]) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    keyring[VARIABLE] = "secret-part\nsecond"
    with pytest.raises(TeacherUnavailableError, match="in the keyring") as caught:
        find_key(VARIABLE)
    assert "secret-part" not in str(caught.value)


@contextmanager
def all_logged() -> Iterator[list[str]]:
    """Everything that is logged by anything, as text."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.getMessage()} {record.exc_text or ''}")

    handler = Keep(logging.DEBUG)
    loggers = [logging.getLogger(name) for name in ("", "anthropic", "httpx2", "httpcore2")]
    levels = [logger.level for logger in loggers]
    loggers[0].addHandler(handler)
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    try:
        yield lines
    finally:
        loggers[0].removeHandler(handler)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


#: Begins as nothing else does, so that it is not found by chance.
keys = st.text(st.sampled_from("abcXYZ0189_-.+/=%&\"'\\"), min_size=8, max_size=40).map(lambda rest: f"sk-zq-{rest}")
faults = st.tuples(
    st.sampled_from(
        ["question 0", "question 1", "batches create", "batches list", "batches retrieve", "batches results"]
    ),
    st.sampled_from(
        ["status", "drop before", "drop after", "text page", "error event", "error", "elsewhere", "redirect"]
    ),
    st.sampled_from([400, 401, 402, 403, 404, 413, 429, 500]),
)


@settings(
    deadline=None,
    max_examples=12,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow],
)
@given(key=keys, struck=st.lists(faults, max_size=4), batch=st.booleans(), right=st.booleans(), stream=st.booleans())
def test_a_key_is_in_no_file_log_or_message(
    tmp_path_factory: pytest.TempPathFactory,
    key: str,
    struck: list[tuple[str, str, int]],
    batch: bool,
    right: bool,
    stream: bool,
) -> None:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "prompts.txt").write_text("question 0\nquestion 1\nquestion 2\n", encoding="utf-8")
    arguments = [
        *("collect", "--prompts", str(folder / "prompts.txt"), "--out", str(folder / "out")),
        *("--teacher", f"anthropic:{MODEL}", "--accept-terms", "--duplicate-threshold", "0"),
        *("--max-tokens", "9000" if stream else "100", *(["--batch"] if batch else [])),
    ]
    said = ""
    with MessagesServer() as server, pytest.MonkeyPatch.context() as patch, all_logged() as logged:
        patch.setattr("anthropic._base_client.INITIAL_RETRY_DELAY", 0.005)
        patch.setattr("mlx_distill.collect.batch.POLL_SECONDS", (0.005, 0.01))
        # What the server takes for right; it repeats one that is wrong.
        patch.setattr(messages_server, "KEY", key if right else "another")
        for name, value in {**server.environment, VARIABLE: key}.items():
            patch.setenv(name, value)
        for place, kind, status in struck:
            message = f"the header x-api-key: {key} is odd"
            fault = Fault(kind, status=status, message=message, retry_after=0.005)  # type: ignore[arg-type]
            server.faults[place].append(fault)
        for more in ([], ["--json"]):
            told = CliRunner().invoke(main, [*arguments, *more])
            assert told.exception is None or isinstance(told.exception, SystemExit)
            said += told.output
        sent = {headers.get("x-api-key") or headers["authorization"].split()[1] for headers, _ in server.requests}
    files = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file()).decode("utf-8", "replace")
    for text in (files, said, "\n".join(logged)):
        assert text
        assert key not in text
        assert json.dumps(key)[1:-1] not in text
    # It went where it belongs: else the property would hold of nothing.
    assert batch or sent == {key}
