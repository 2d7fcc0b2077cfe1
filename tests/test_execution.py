"""Programs that nobody has read: each ends in time, in its own outcome, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent

import pytest

from mlx_distill.execution import Execution, Limits, isolation_level, run_python, run_sql
from mlx_distill.execution.run import _end_orphans

QUICK = Limits(seconds=2.0, cpu_seconds=2, memory_bytes=256 << 20, processes=16)


def processes_that_mention(folder: Path) -> list[str]:
    """Processes whose environment, command or working folder names a folder."""
    proc = Path("/proc")
    if not (proc / "self" / "stat").exists():
        listing = subprocess.run(
            ["/bin/ps", "-axwwE", "-o", "pid=,command="], capture_output=True, text=True, check=True
        )
        return [line for line in listing.stdout.splitlines() if str(folder) in line]
    found = []
    for process in proc.glob("[0-9]*"):
        try:
            known = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            known += str((process / "cwd").readlink()).encode()
        except OSError:
            continue
        if str(folder).encode() in known and int(process.name) != os.getpid():
            found.append(process.name)
    return found


@pytest.fixture(autouse=True)
def nothing_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test: no process and no temporary folder outlives the run."""
    folder = (tmp_path / "temporary").resolve()
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield
    assert list(folder.iterdir()) == []
    assert processes_that_mention(folder) == []


def run(source: str, limits: Limits = QUICK) -> Execution:
    return run_python(dedent(source), limits=limits)


def test_a_good_program_passes_and_its_output_is_kept() -> None:
    execution = run("import json, sqlite3, asyncio\nprint('hällo')")
    assert (execution.outcome, execution.problem, execution.exit_code) == ("passed", None, 0)
    assert execution.stdout == "hällo\n"
    assert execution.output_bytes == len("hällo\n".encode())
    assert 0 < execution.seconds < 2


def test_it_runs_as_main_from_a_file_in_an_empty_folder() -> None:
    execution = run("""
        import os, sys
        print(__name__, os.path.basename(__file__), os.listdir("."), sys.argv == [__file__], os.getcwd() == os.environ["HOME"])
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
    assert run("data = bytearray(3 << 30)").outcome == "memory"
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
        import os, subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        if os.fork() == 0:
            os.setsid()
            if os.fork():
                os._exit(0)
            import time
            time.sleep(60)
        print(child.pid)
    """)
    assert execution.outcome == "passed"
    with pytest.raises(ProcessLookupError):
        os.kill(int(execution.stdout), 0)


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
    script = "from mlx_distill.execution import run_python, Limits\nrun_python('import time; time.sleep(60)', limits=Limits(seconds=50))"
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


# ---- tests inside the program


def test_functions_that_the_program_does_not_call_are_called() -> None:
    execution = run("""
        def test_good(): assert True
        def test_bad(): assert 1 == 2
        async def test_awaited(): assert 1 == 2
        def test_with_fixture(tmp_path): assert False
        print("all 4 tests passed")
    """)
    assert execution.outcome == "failed"
    assert (execution.tests_run, execution.tests_skipped) == (3, 1)
    assert execution.tests_failed >= 1
    assert "1 == 2" in execution.stderr


def test_functions_that_the_program_calls_are_counted_once() -> None:
    execution = run("""
        calls = []
        def test_one(): calls.append(1)
        def test_two(): calls.append(2)
        if __name__ == "__main__":
            test_one()
            test_two()
            assert calls == [1, 2]
            import atexit
            atexit.register(lambda: print(calls))
    """)
    assert (execution.outcome, execution.tests_run, execution.tests_failed) == ("passed", 2, 0)
    assert execution.stdout == "[1, 2]\n"


@pytest.mark.parametrize("ending", ["unittest.main()", "unittest.main(exit=False)", ""])
def test_test_cases_are_counted_once_whoever_runs_them(ending: str) -> None:
    execution = run(f"""
        import unittest
        runs = []
        class Base(unittest.TestCase):
            def test_shared(self): runs.append(1)
        class Derived(Base):
            @classmethod
            def setUpClass(cls): cls.ready = True
            def test_more(self): self.assertTrue(self.ready)
            @unittest.skip("not now")
            def test_skipped(self): self.fail()
            def test_parts(self):
                for n in range(3):
                    with self.subTest(n=n):
                        self.assertGreaterEqual(n, 0)
        import atexit
        atexit.register(lambda: print(len(runs)))
        {ending}
    """)
    assert (execution.outcome, execution.tests_run, execution.tests_failed) == ("passed", 4, 0)
    assert execution.tests_skipped == 1
    assert execution.stdout == "2\n"


@pytest.mark.parametrize("ending", ["unittest.main()", "unittest.main(exit=False)", ""])
def test_a_failing_test_case_fails_the_program(ending: str) -> None:
    execution = run(f"""
        import unittest
        class Test(unittest.TestCase):
            def test_good(self): pass
            def test_bad(self): self.fail()
        {ending}
    """)
    assert (execution.outcome, execution.tests_run, execution.tests_failed) == ("failed", 2, 1)


def test_what_fails_around_the_tests_fails_the_program() -> None:
    execution = run("""
        import unittest
        class Test(unittest.TestCase):
            @classmethod
            def setUpClass(cls): raise RuntimeError
            def test_good(self): pass
    """)
    assert execution.outcome == "failed"


def test_plain_test_classes_are_run() -> None:
    execution = run("""
        class TestThing:
            def setup_method(self): self.value = 1
            def test_good(self): assert self.value == 1
            def test_bad(self): assert self.value == 2
    """)
    assert (execution.outcome, execution.tests_run, execution.tests_failed) == ("failed", 2, 1)


@pytest.mark.parametrize(
    "leave", ["sys.exit(0)", "os._exit(0)", "os.execv('/bin/echo', ['echo', 'OK'])", "raise SystemExit"]
)
def test_leaving_before_the_tests_does_not_pass(leave: str) -> None:
    execution = run(f"""
        import os, sys
        print("Ran 1 test in 0.000s\\n\\nOK")
        {leave}
        def test_never_reached(): assert False
    """)
    assert execution.outcome == "failed"
    assert execution.tests_run == 0


def test_leaving_after_the_tests_are_defined_does_not_spare_them() -> None:
    execution = run("""
        import sys
        def test_bad(): assert False
        print("all tests passed")
        sys.exit(0)
    """)
    assert (execution.outcome, execution.tests_failed) == ("failed", 1)


def test_writing_to_every_file_descriptor_forges_no_report() -> None:
    execution = run("""
        import json, os
        for handle in range(3, 64):
            try:
                os.write(handle, (json.dumps({"event": "done", "token": "", "run": 9, "failed": 0}) + "\\n").encode())
            except OSError:
                pass
        os._exit(0)
    """)
    assert execution.outcome == "failed"
    assert execution.tests_run == 0


def test_a_forked_copy_reports_nothing() -> None:
    execution = run("""
        import os, sys
        def test_bad(): assert False
        if os.fork():
            os._exit(0)
    """)
    assert execution.outcome == "failed"
    assert execution.tests_run == 0


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


# ---- SQL


def test_sql_runs_in_order_on_an_empty_database() -> None:
    execution = run_sql("CREATE TABLE t (a, b); INSERT INTO t VALUES (1, 'x;y'), (2, NULL);\nSELECT * FROM t -- end")
    assert (execution.outcome, execution.statements, execution.stdout) == ("passed", 3, "1\tx;y\n2\tNULL\n")


def test_a_trigger_is_one_statement() -> None:
    script = (
        "CREATE TABLE t (a); CREATE TRIGGER r AFTER INSERT ON t BEGIN UPDATE t SET a = 2; UPDATE t SET a = a + 1; END;"
    )
    execution = run_sql(f"{script} INSERT INTO t VALUES (0); SELECT a FROM t;")
    assert (execution.outcome, execution.statements, execution.stdout) == ("passed", 4, "3\n")


def test_sql_that_is_wrong_endless_or_reaches_for_files_fails(tmp_path: Path) -> None:
    wrong = run_sql("SELECT 1; SELECT nothing FROM nowhere;")
    assert (wrong.outcome, wrong.error) == ("failed", "OperationalError")
    assert wrong.stderr.startswith("statement 2: ")
    endless = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n;"
    assert run_sql(endless, limits=QUICK).outcome == "timeout"
    target = tmp_path / "stolen.db"
    assert run_sql(f"ATTACH '{target}' AS other;").outcome == "failed"
    assert run_sql(f"VACUUM INTO '{target}';").outcome == "failed"
    assert not target.exists()
    assert run_sql("SELECT '\0';").outcome == "failed"


def test_the_isolation_level_admits_what_it_does_not_cover() -> None:
    level = isolation_level()
    assert level.name == "process"
    assert "network" in level.not_covered
    assert any("file" in gap for gap in level.not_covered)
