"""Programs that nobody has read: each ends in time, in its own outcome, and leaves nothing behind (see conftest)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlx_distill.execution import Limits, isolation_level, run_python
from mlx_distill.execution.run import _end_orphans
from tests.execution.programs import QUICK, processes_that_mention, run


def test_a_good_program_passes_and_its_output_is_kept() -> None:
    execution = run("import json, sqlite3, asyncio\nprint('hällo')")
    assert (execution.outcome, execution.problem, execution.exit_code) == ("passed", None, 0)
    assert execution.stdout == "hällo\n"
    assert execution.output_bytes == len("hällo\n".encode())
    assert 0 < execution.seconds < 2


def test_it_runs_as_main_from_a_file_in_an_empty_folder() -> None:
    execution = run("""
        import os, sys
        print(__name__, os.path.basename(__file__), os.listdir("."), end=" ")
        print(sys.argv == [__file__], os.getcwd() == os.environ["HOME"])
        import __main__
        print(__main__.__file__ == __file__, hasattr(__main__, "sys"))
    """)
    assert execution.stdout == "__main__ main.py ['main.py'] True True\nTrue True\n"


def test_the_environment_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_API_KEY", "hush")
    execution = run("import os; print(sorted(os.environ)); print('hush' in str(os.environ))")
    names = execution.stdout.splitlines()[0]
    allowed = {"HOME", "LANG", "LC_CTYPE", "PATH", "TMPDIR", "__CF_USER_TEXT_ENCODING"}
    assert set(eval(names)) <= allowed
    assert execution.stdout.endswith("False\n")


def test_third_party_packages_are_not_there_and_are_named() -> None:
    execution = run("import pydantic")
    assert (execution.outcome, execution.error, execution.missing_module) == (
        "failed",
        "ModuleNotFoundError",
        "pydantic",
    )


def test_an_endless_loop_is_stopped_by_the_clock_or_the_processor_limit() -> None:
    for source in ("while True: pass", "import time\ntime.sleep(60)"):
        start = time.monotonic()
        assert run(source).outcome == "timeout"
        assert time.monotonic() - start < 6


def test_processor_time_has_a_limit_of_its_own() -> None:
    execution = run("while True: pass", Limits(seconds=30, cpu_seconds=1))
    assert execution.outcome == "timeout"
    assert "processor time" in str(execution.problem)


def test_signal_handlers_do_not_help_a_program_to_stay() -> None:
    execution = run("""
        import signal, time
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True:
            time.sleep(0.1)
    """)
    assert execution.outcome == "timeout"


def test_a_program_that_stops_itself_is_ended() -> None:
    assert run("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)").outcome == "timeout"


def test_a_fork_bomb_is_ended() -> None:
    # Bounded, should the limit fail: at most 2 ** 8 processes, each for 5 s.
    execution = run("""
        import os, time
        for _ in range(8):
            os.fork()
        time.sleep(5)
    """)
    assert execution.outcome == "processes"


def test_much_memory_at_once_is_refused_and_little_by_little_is_stopped() -> None:
    assert run("data = b'x' * (3 << 30)").outcome == "memory"
    assert run("data = []\nwhile True: data.append(b'x' * (1 << 20))").outcome == "memory"


def test_memory_is_counted_over_all_processes() -> None:
    execution = run("""
        import os, time
        for _ in range(4):
            if os.fork() == 0:
                data = b"x" * (100 << 20)
                time.sleep(5)
        time.sleep(5)
    """)
    assert execution.outcome == "memory"


def test_endless_output_is_stopped_and_only_its_end_is_kept() -> None:
    execution = run("while True: print('x' * 100_000)", Limits(output_bytes=1 << 20, tail_bytes=1000))
    assert execution.outcome == "output"
    assert len(execution.stdout) == 1000
    assert 1 << 20 < execution.output_bytes < 4 << 20


def test_output_over_the_limit_counts_even_when_the_program_ends_at_once() -> None:
    assert run("print('x' * 2000)", Limits(output_bytes=1000)).outcome == "output"


def test_files_have_a_limit_each_and_together() -> None:
    execution = run("open('big', 'wb').write(b'x' * (2 << 20))", Limits(file_bytes=1 << 20))
    assert (execution.outcome, execution.error) == ("failed", "OSError")
    execution = run(
        """
        import itertools, time
        for number in itertools.count():
            open(str(number), "wb").write(b"x" * 500_000)
            time.sleep(0.005)
        """,
        Limits(file_bytes=1 << 20, disk_bytes=4 << 20),
    )
    assert execution.outcome == "output"


def test_deleting_everything_in_its_folder_harms_nobody() -> None:
    execution = run("""
        import os, shutil
        for name in os.listdir("."):
            os.remove(name)
        shutil.rmtree(os.getcwd())
        print("gone")
    """)
    assert (execution.outcome, execution.stdout) == ("passed", "gone\n")


def test_folders_that_resist_deletion_are_deleted() -> None:
    execution = run("""
        import os
        os.makedirs("closed/inner")
        open("closed/inner/file", "w").close()
        os.chmod("closed/inner", 0)
        os.chmod("closed", 0)
        for _ in range(1500):
            os.mkdir("deep")
            os.chdir("deep")
    """)
    assert execution.outcome == "passed"


def test_a_child_in_a_session_of_its_own_does_not_outlive_the_program() -> None:
    execution = run("""
        import os, subprocess, sys, time
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            time.sleep(60)
    """)
    assert execution.outcome == "passed"
    # That neither is left is checked after every test.


def test_a_program_that_kills_its_watcher_is_ended_all_the_same() -> None:
    execution = run("""
        import os, signal, time
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)
    """)
    assert execution.outcome == "crashed"


def test_ending_orphans_of_nobody_is_harmless(tmp_path: Path) -> None:
    _end_orphans(str(tmp_path / "nowhere"), None)


def test_the_program_ends_when_its_caller_is_killed(tmp_path: Path) -> None:
    folder = Path(tempfile.gettempdir())
    script = (
        "from mlx_distill.execution import run_python, Limits\n"
        "run_python('import time; time.sleep(60)', limits=Limits(seconds=50))"
    )
    environment = {**os.environ, "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    caller = subprocess.Popen([sys.executable, "-c", script], env=environment)
    deadline = time.monotonic() + 20
    while not list(folder.glob("mlx-distill-run-*/main.py")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.3)
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    while (list(folder.iterdir()) or processes_that_mention(folder)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert time.monotonic() < deadline


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("def f(:\n", "SyntaxError"),
        ("x = '\0'\n", None),
        ("  x = 1\n", "IndentationError"),
        ("\ud800", None),
        ("\x1b[2J\x07 ???", "SyntaxError"),
        ("raise ValueError('no \\x1b[31m\\ud800')", "ValueError"),
    ],
)
def test_broken_and_strange_sources_fail(source: str, error: str | None) -> None:
    execution = run_python(source, limits=QUICK)
    assert execution.outcome == "failed"
    assert error is None or execution.error == error
    assert "driver.py" not in execution.stderr


def test_strange_output_is_text_in_the_end() -> None:
    execution = run(r"import sys; sys.stdout.buffer.write(b'\xff\x00\x1b[2J\xe2\x82'); print('\N{SNOWMAN}')")
    assert execution.passed
    assert execution.stdout == "\ufffd\0\x1b[2J\ufffd☃\n"


def test_a_crash_of_the_interpreter_is_a_crash() -> None:
    execution = run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert (execution.outcome, execution.exit_code) == ("crashed", -signal.SIGSEGV)


def test_there_is_no_input_to_read() -> None:
    assert run("input()").error == "EOFError"


def test_exit_is_there_as_in_any_interpreter() -> None:
    assert run("exit()").passed
    assert run("quit(3)").exit_code == 3


def test_the_order_of_sets_is_the_same_each_time() -> None:
    source = "print(list({str(n) for n in range(50)}))"
    assert run(source).stdout == run(source).stdout


def test_threads_and_processes_of_honest_programs_work() -> None:
    execution = run(
        """
        import concurrent.futures, subprocess, sys, threading

        def square(n): return n * n

        if __name__ == "__main__":
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                assert list(pool.map(square, range(4))) == [0, 1, 4, 9]
            with concurrent.futures.ProcessPoolExecutor(2) as pool:
                assert list(pool.map(square, range(4))) == [0, 1, 4, 9]
            assert subprocess.run([sys.executable, "-c", "print(1)"], capture_output=True).stdout == b"1\\n"
        """,
        Limits(),
    )
    assert execution.outcome == "passed", execution.stderr


def test_many_at_once_do_not_disturb_each_other() -> None:
    with ThreadPoolExecutor(4) as pool:
        executions = list(pool.map(lambda n: run(f"print({n})", Limits()), range(12)))
    assert [execution.stdout for execution in executions] == [f"{n}\n" for n in range(12)]
    assert all(execution.passed for execution in executions)


def test_an_interpreter_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    execution = run("print(1)")
    assert execution.outcome == "not_started"
    assert "/nowhere/python" in str(execution.problem)


def test_the_isolation_level_admits_what_it_does_not_cover() -> None:
    level = isolation_level()
    assert level.name == "process"
    assert "network" in level.not_covered
    assert any("file" in gap for gap in level.not_covered)
