"""What goes to standard output and standard error, to whom, and how a command ends when it is interrupted."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mlx_distill.cli.command import run_guarded
from mlx_distill.cli.console import Summary, TerminalProgress
from mlx_distill.cli.main import main
from tests.children import ROOT, read_to_end


def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    """`mlx-distill` in a process of its own."""
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **given.pop("env", {})}
    return subprocess.Popen([sys.executable, "-m", "mlx_distill", *arguments], env=environment, **given)


@pytest.fixture
def collection(tmp_path: Path) -> list[str]:
    """A collection that succeeds within a second."""
    (tmp_path / "p.txt").write_text("a\nc\n", encoding="utf-8")
    (tmp_path / "r.jsonl").write_text(
        '{"prompt": "a", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n', encoding="utf-8"
    )
    return [
        *("collect", "--prompts", f"{tmp_path}/p.txt", "--teacher", f"recorded:{tmp_path}/r.jsonl"),
        *("--out", f"{tmp_path}/out", "--valid-fraction", "0", "--test-fraction", "0"),
    ]


# Standard output.


def test_json_is_one_object_whatever_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    def body() -> Summary:
        print("a library says something")  # noqa: T201
        with TerminalProgress().task("Working", total=2, unit="rows") as bar:
            bar.advance(1, loss="1.0")
        return Summary({"text": "a\nb é", "none": None})

    run_guarded(body, as_json=True, keeps="")
    out, err = capfd.readouterr()
    assert json.loads(out) == {"text": "a\nb é", "none": None}
    assert out.count("\n") == 1
    assert "a library says something" in err
    assert "Working: 1/2 rows" in err


def test_json_is_one_object_beside_live_bars(collection: list[str]) -> None:
    ours, theirs = pty.openpty()
    process = start(*collection, "--json", stderr=theirs, env={"TERM": "xterm-256color"})
    os.close(theirs)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_to_end, ours)
        out, _ = process.communicate(timeout=60)
        seen = reading.result(timeout=60)
    assert process.returncode == 0
    assert json.loads(out)["answered"] == 2
    assert out.count(b"\n") == 1
    assert b"\x1b[" in seen


def test_titles_and_notes_are_no_markup() -> None:
    ours, theirs = pty.openpty()
    source = (
        "from mlx_distill.cli.console import TerminalProgress\n"
        "with TerminalProgress().task('Fusing [a]{b}', total=1, unit='rows') as bar:\n    bar.advance(1, note='[/c]')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "200"}
    process = subprocess.Popen([sys.executable, "-c", source], env=environment, stderr=theirs)
    os.close(theirs)
    out = read_to_end(ours)
    assert process.wait(timeout=60) == 0
    assert b"Fusing [a]{b}" in out
    assert b"[/c]" in out


def test_a_terminal_without_unicode_gets_escapes(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a\n", encoding="utf-8")
    out_path = tmp_path / "ü→.jsonl"
    environment = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    for flags in ([], ["--json"]):
        process = start("prompts", str(tmp_path / "p.txt"), "--out", str(out_path), *flags, env=environment)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.isascii()
        if flags:
            assert json.loads(out)["out"] == str(out_path)


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_path_that_is_no_text_can_be_told(tmp_path: Path, flags: list[str]) -> None:
    folder = os.fsencode(tmp_path) + b"/not-text-\xff"
    try:
        os.mkdir(folder)  # noqa: PTH102 - bytes
    except OSError:
        pytest.skip("this file system has no such names")
    (tmp_path / "p.txt").write_text("a\n", encoding="utf-8")
    process = start("prompts", str(tmp_path / "p.txt"), "--out", os.fsdecode(folder + b"/x.jsonl"), *flags)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert rb"not-text-\udcff/x.jsonl" in out
    assert Path(os.fsdecode(folder), "x.jsonl").exists()


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_who_leaves_is_no_error(flags: list[str]) -> None:
    process = start("prompts", "data/prompts/coding.toml", *flags, cwd=ROOT)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 1
    assert err == b""


# Interruptions: exit 130.

SLEEPING = """
import sys, time
from mlx_distill.cli.command import run_guarded
from mlx_distill.cli.console import Summary

def body():
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
    return Summary({})

run_guarded(body, as_json=True, keeps="All is kept; the same command goes on.")
"""

IMPORTING = """
import sys, time
from mlx_distill.cli import main

def slow(name):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)

main.importlib.import_module = slow
main.main(["train", "--help"])
"""


@pytest.fixture
def interrupted() -> Iterator[Callable[[str, signal.Signals], tuple[int, str, str]]]:
    processes: list[subprocess.Popen[str]] = []

    def run(source: str, number: signal.Signals) -> tuple[int, str, str]:
        process = subprocess.Popen(
            [sys.executable, "-c", source],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stderr is not None
        assert process.stderr.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    yield run
    for process in processes:
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("source", "told"),
    [
        (SLEEPING, "\nInterrupted. All is kept; the same command goes on.\n"),
        (IMPORTING, "\nInterrupted. Nothing had begun.\n"),
    ],
)
def test_an_interruption_says_what_was_kept(
    interrupted: Callable[[str, signal.Signals], tuple[int, str, str]], number: signal.Signals, source: str, told: str
) -> None:
    assert interrupted(source, number) == (130, "", told)


def test_sigterm_is_as_it_was_after_a_command() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert CliRunner().invoke(main, ["prompts", str(ROOT / "data" / "prompts" / "coding.toml")]).exit_code == 0
    assert signal.getsignal(signal.SIGTERM) is before
