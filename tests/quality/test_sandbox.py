"""The operating system's sandbox: what programs need goes, what they must not do is refused."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlx_distill.errors import IsolationError
from mlx_distill.execution import (
    Execution,
    Limits,
    SandboxSupport,
    isolation_level,
    run_python,
    run_sql,
    sandbox_support,
)
from mlx_distill.execution import run as execution_run

pytestmark = pytest.mark.skipif(
    sandbox_support().problem is not None, reason="the extra 'sandbox' is not installed, or has no kernel"
)
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only tried on Linux")


def confined(source: str, limits: Limits | None = None) -> Execution:
    return run_python(source, limits=limits, sandbox=True)


def refused(statement: str) -> None:
    """A statement that the sandbox refuses, and that a plain process carries out."""
    program = f"""
import os, socket, pathlib, subprocess, sys
try:
    {statement}
except OSError:
    pass
else:
    raise SystemExit("carried out")
"""
    execution = confined(program)
    assert execution.passed, execution
    assert run_python(program).problem == "It ended with exit status 1."


@contextmanager
def listening(kind: socket.SocketKind) -> Iterator[int]:
    with socket.socket(socket.AF_INET, kind) as server:
        server.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            server.listen()
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    "source",
    [
        "print('hello')",
        "import json, sqlite3, ssl, ctypes, decimal, unittest, asyncio, zoneinfo\nasyncio.run(asyncio.sleep(0))",
        "import sqlite3\nsqlite3.connect('a.db').execute('create table t(x)')",
        "import tempfile, pathlib\nwith tempfile.TemporaryDirectory() as d: pathlib.Path(d, 'x').write_text('x')",
        "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()",
        "import subprocess, sys\nassert subprocess.check_output([sys.executable, '-c', 'print(1)']) == b'1\\n'",
        "import subprocess\nsubprocess.run(['ls', '.'], check=True)",
        "import socket\na, b = socket.socketpair()\na.send(b'x')\nassert b.recv(1) == b'x'",
        "import os\nopen(os.devnull, 'w').write('x')\nassert len(os.urandom(4)) == 4",
        "import shutil, os\nos.mkdir('a')\nopen('a/b', 'w').close()\nos.rename('a/b', 'c')\nshutil.rmtree('a')",
    ],
)
def test_what_programs_need_goes(source: str) -> None:
    execution = confined(source)
    assert execution.passed, execution


@LINUX
def test_processes_share_locks_and_results() -> None:
    execution = confined("""
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
def double(x): return 2 * x
if __name__ == "__main__":
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(double, range(4))) == [0, 2, 4, 6]
""")
    if execution.error == "PermissionError":
        pytest.skip("this kernel gives programs no shared memory of their own")
    assert execution.passed, execution


@LINUX
def test_shared_memory_is_the_programs_own() -> None:
    name = f"/dev/shm/mlx-distill-test-{os.getpid()}"
    Path(name).write_text("ours")
    try:
        confined(
            f"import os\nfor n in os.listdir('/dev/shm'): os.unlink('/dev/shm/' + n)\nopen({name!r}, 'w').write('x')"
        )
        assert Path(name).read_text() == "ours"
    finally:
        Path(name).unlink()


def test_tests_in_a_program_run_and_sql_too() -> None:
    execution = confined("def test_a(): assert True\ndef test_b(): assert False")
    assert (execution.outcome, execution.tests_run, execution.tests_failed) == ("failed", 2, 1)
    assert run_sql("SELECT 42;", sandbox=True).stdout == "42\n"


def test_files_outside_are_neither_read_nor_written(tmp_path: Path) -> None:
    private = tmp_path / "private.txt"
    private.write_text("private")
    if sys.platform == "linux":  # on macOS the system's policy opens temporary folders for reading
        refused(f"open({str(private)!r}).read()")
        refused(f"os.listdir({str(tmp_path)!r})")
        refused(f"open('/proc/{os.getpid()}/environ', 'rb').read()")
    refused(f"os.listdir({str(Path.home())!r})")
    refused(f"open({str(private)!r}, 'a')")
    refused(f"pathlib.Path({str(tmp_path)!r}, 'new').touch()")
    refused(f"os.symlink('main.py', {str(tmp_path / 'link')!r})")
    refused(f"os.truncate({str(private)!r}, 3)")
    (tmp_path / "target").touch()
    refused(f"os.unlink({str(tmp_path / 'target')!r})")
    assert private.read_text() in ("private", "pri")


def test_children_are_confined_as_well(tmp_path: Path) -> None:
    execution = confined(f"""
import subprocess, sys
code = "open({str(tmp_path / "new")!r}, 'w')"
assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 1
assert subprocess.run(["/bin/sh", "-c", "echo x > {tmp_path / "new"}"], stderr=subprocess.DEVNULL).returncode != 0
""")
    assert execution.passed, execution
    assert list(tmp_path.iterdir()) == []


def test_the_network_is_out_of_reach() -> None:
    with listening(socket.SOCK_STREAM) as port:
        refused(f"socket.create_connection(('127.0.0.1', {port}), 5)")
    with listening(socket.SOCK_DGRAM) as port:
        refused(f"socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))")
    refused("socket.create_server(('127.0.0.1', 0))")


@LINUX
def test_other_processes_are_out_of_reach() -> None:
    if "signals to the user's other processes" in isolation_level(sandbox=True).not_covered:
        pytest.skip("this kernel does not keep signals in")
    refused(f"os.kill({os.getpid()}, 0)")


@pytest.mark.parametrize(
    ("source", "outcome"),
    [
        ("while True: pass", "timeout"),
        ("import time\ntime.sleep(60)", "timeout"),
        ("data = bytearray(1 << 30)", "memory"),
        ("import os, time\nfor _ in range(8): os.fork()\ntime.sleep(5)", "processes"),
        ("while True: print('x' * 1000)", "output"),
        ("import os\nos.abort()", "crashed"),
    ],
)
def test_the_limits_hold_inside(source: str, outcome: str) -> None:
    limits = Limits(seconds=3.0, cpu_seconds=2, memory_bytes=256 << 20, processes=16)
    assert confined(source, limits).outcome == outcome


def test_the_level_says_what_is_held_off_and_what_is_not() -> None:
    level = isolation_level(sandbox=True)
    assert str(level) == f"sandbox ({sandbox_support().mechanism})"
    assert "network" in level.enforced
    assert "network" not in level.not_covered
    assert "Unix sockets with a path" in level.not_covered
    assert str(isolation_level()) == "process"
    assert "network" in isolation_level().not_covered


def test_without_support_nothing_runs_unconfined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        execution_run, "sandbox_support", lambda: SandboxSupport(None, "No sandbox here.", installed=False)
    )
    with pytest.raises(IsolationError, match="No sandbox here"):
        confined("print(1)")
    with pytest.raises(IsolationError, match="No sandbox here"):
        isolation_level(sandbox=True)
    assert run_python("print(1)").passed


def test_a_sandbox_that_cannot_be_set_up_runs_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nono_py.py").write_text("raise RuntimeError('no luck')")
    monkeypatch.syspath_prepend(str(tmp_path))
    execution = confined("print('ran')")
    assert execution.outcome == "not_started"
    assert "no luck" in str(execution.problem)
    assert execution.stdout == ""
