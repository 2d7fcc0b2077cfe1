"""The OpenAI-compatible teacher against the real `mlx_lm.server`, serving SmolLM2 on loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlx_distill.errors import TeacherUnavailableError
from mlx_distill.records import Message, Request
from mlx_distill.teachers.registry import open_teacher

#: What the command `mlx_lm.server` runs, after MLX has been given a fast BLAS.
SERVER = "import mlx_distill.backends.mlx; from mlx_lm.server import main; main()"
STARTS_WITHIN = 120.0


@pytest.fixture(scope="module")
def base_url(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, "--model", str(smollm2), "--port", str(port)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # One thread: beside other tests, several would wait for one another.
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OPENBLAS_NUM_THREADS": "1"},
        )
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()
        process.wait()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + STARTS_WITHIN
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with opener.open(url, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.1)
    pytest.fail(f"mlx_lm.server did not start:\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")


def ask_for(text: str, max_tokens: int) -> Request:
    message = Message(role="user", content=text)
    return Request(prompt_id="p", family="p", teacher="t", messages=(message,), max_tokens=max_tokens)


@pytest.mark.slow
async def test_it_answers_counts_and_is_cut_where_it_was_told_to(base_url: str) -> None:
    teacher = open_teacher("openai:default_model", base_url=base_url)
    assert not teacher.terms().requires_acceptance
    cut = await teacher.ask(ask_for("Count from one to ten.", 5))
    assert (cut.stop, cut.stop_reason, cut.usage.output_tokens) == ("length", "length", 5)
    assert cut.text.strip()
    assert cut.usage.input_tokens > 6
    whole = await teacher.ask(ask_for("Answer with yes or no: is the sky blue? Only one word.", 60))
    assert (whole.stop, whole.stop_reason) == ("end", "stop")
    assert 0 < whole.usage.output_tokens <= 60
    await teacher.close()


async def test_a_model_that_it_has_not_is_told(base_url: str) -> None:
    teacher = open_teacher("openai:nobody/nothing", base_url=base_url)
    with pytest.raises(TeacherUnavailableError, match="no such model"):
        await teacher.ask(ask_for("Hi", 1))
    await teacher.close()
