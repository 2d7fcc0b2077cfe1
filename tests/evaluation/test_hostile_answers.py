"""Whatever a model answers is an outcome of that task: bounded, named, and without harm to this machine or the run."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path
from textwrap import dedent

import pytest

from mlx_distill.evaluation import Outcome, python_tests, score_answer, score_answers
from mlx_distill.evaluation.scoring import MOST_CHARACTERS
from mlx_distill.execution import Limits, sandbox_support
from tests.evaluation.asked import NAMES, QUICK, TRIPLE, fenced
from tests.execution.conftest import nothing_left  # noqa: F401 - for every test here

pytestmark = pytest.mark.slow

SANDBOX = pytest.mark.skipif(sandbox_support().problem is not None, reason="no sandbox here")


def scored(text: str, *, sandbox: bool = False) -> Outcome:
    return score_answer(TRIPLE, text, sandbox=sandbox)


def ran(code: str, *, sandbox: bool = False) -> Outcome:
    return scored(fenced(dedent(code)), sandbox=sandbox)


def within(outcome: str | tuple[str, ...]) -> Limits:
    """Limits for a program that is expected to end like this: what has to be stopped need not be waited for."""
    return QUICK.model_copy(update={"seconds": 1.0}) if outcome == "timeout" else QUICK


RIGHT = "def triple(n):\n    return 3 * n\n"

TEXTS = {
    "nothing": ("", "no_code"),
    "white space": (" \n\t\r\n", "no_code"),
    "an empty block": ("```python\n```", "no_code"),
    "prose": ("I am sorry, I cannot do that.", "no_code"),
    "one word": ("triple", "no_code"),
    "a hundred thousand words": ("word " * 100_000, "no_code"),
    "a line without end": ("x" * 2_000_000, "no_code"),
    "a hundred thousand words, then code": ("word " * 100_000 + f"\n```python\n{RIGHT}```", "no_code"),
    "ninety thousand words, then code": ("word " * 90_000 + f"\n\n```python\n{RIGHT}```", "passed"),
    "a very long program": (fenced(RIGHT + "# and so on, and so on\n" * 20_000), "passed"),
    "a program that breaks off far beyond the limit": (fenced(f"x = '{'y' * MOST_CHARACTERS}'\n{RIGHT}"), "not_parsed"),
    "control characters": ("\x00\x01\x1b[2J\x07\x7f\u202e", "no_code"),
    "control characters around code": (f"\x1b[31m\x07\n```python\n{RIGHT}```\n\x1b[0m", "passed"),
    "a null byte in a string": (fenced(f"x = '\0'\n{RIGHT}"), "passed"),  # Markdown has none: it is replaced
    "a null byte in code": (fenced(f"x = \0\n{RIGHT.replace('triple', 'other')}"), "not_parsed"),
    "a lone surrogate in code": (fenced(f"x = '\ud800'\n{RIGHT}"), "not_parsed"),
    "an escape sequence in code": (fenced("def triple(n):\n    \x1b[2J return 3 * n"), "not_parsed"),
    "HTML": ("<html><body><script>alert(1)</script><pre>def triple(n): return 3*n</pre></body></html>", "no_code"),
    "a fence in HTML": (f"<div>\n\n```python\n{RIGHT}```\n\n</div>", "passed"),
    "a fence that never closes": (f"```python\n{RIGHT}", "passed"),
    "a fence cut in a line": ("```python\ndef triple(n):\n    return 3 *", "not_parsed"),
    "fences that never close": ("```python\n" * 50_000, "not_parsed"),
    "only backticks": ("`" * 500_000, "no_code"),
    "deep quotation": ("> " * 200_000 + "x", "no_code"),
    "deep lists": ("- " * 200_000 + "x", "no_code"),
    "ten thousand empty blocks": ("```python\npass\n```\n" * 10_000, "error"),
    "brackets without end": (fenced("(" * 100_000), "not_parsed"),
    "signs without end": (fenced("x = " + "-" * 100_000 + "1"), "not_parsed"),
    "another language": ("```java\nclass A {}\n```", "no_code"),
    "a console session": ("```python\n>>> 1 + 1\n2\n```", "no_code"),
    "code without a fence": (RIGHT, "passed"),
    "a block without a label": (f"```\n{RIGHT}```", "passed"),
    "carriage returns": (fenced(RIGHT).replace("\n", "\r\n"), "passed"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_strange_texts(name: str) -> None:
    text, outcome = TEXTS[name]
    found = scored(text)
    assert found.outcome == outcome, found
    assert found.parses is {"no_code": None, "not_parsed": False}.get(outcome, True)
    assert found.tests == 3
    assert found.tests_passed == (3 if outcome == "passed" else 0)


PROGRAMS = {
    "loops when imported": ("while True: pass", "timeout"),
    "loops when called": ("def triple(n):\n    while True: pass", "timeout"),
    "sleeps": ("import time\ndef triple(n): time.sleep(1000)", "timeout"),
    "catches everything and goes on": (
        """
        def triple(n):
            while True:
                try:
                    while True: pass
                except BaseException: pass
        """,
        "timeout",
    ),
    "waits in a thread for ever": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(99,)).start()\ndef triple(n): return 3 * n",
        "timeout",
    ),
    "forks": ("import os, time\nfor _ in range(8): os.fork()\ntime.sleep(5)", "processes"),
    "allocates at once": ("def triple(n): return bytearray(3 << 30)", "memory"),
    "allocates little by little": ("data = []\nwhile True: data.append(bytearray(1 << 20))", "memory"),
    "returns something huge": ("def triple(n): return [0] * (1 << 24)", ("failed", "memory", "timeout")),
    "returns itself": ("def triple(n):\n    a = []\n    a.append(a)\n    return a", "failed"),
    "returns without end": (
        "class Endless(list):\n    def __iter__(self):\n        while True: yield 1\ndef triple(n): return Endless()",
        ("timeout", "memory"),
    ),
    "prints gigabytes": ("def triple(n):\n    while True: print('x' * 1_000_000)", "output"),
    "prints gigabytes as an error": ("import sys\nwhile True: sys.stderr.write('x' * 1_000_000)", "output"),
    "writes big files": (
        "import itertools\nfor n in itertools.count(): open(str(n), 'wb').write(b'x' * (1 << 20))",
        "output",
    ),
    "writes a sparse file": ("open('big', 'wb').truncate(1 << 40)", "error"),
    "crashes": ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "crashed"),
    "kills its watcher": ("import os, signal, time\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)", "crashed"),
    "stops itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout"),
    "recurses": ("def triple(n): return triple(n + 1)", "failed"),
    "reads its input": ("n = input()\ndef triple(n): return 3 * n", "error"),
    "leaves": ("import os\nos._exit(0)", "error"),
    "leaves when called": ("import os\ndef triple(n): os._exit(0)", "error"),
    "becomes another program": ("import os\ndef triple(n): os.execv('/bin/echo', ['echo', 'passed'])", "error"),
    "raises": ("raise ValueError('\\x1b[2J\\ud800\\n' * 1000)", "error"),
    "raises what cannot be shown": (
        "class E(Exception):\n    def __str__(self): raise self\ndef triple(n): raise E",
        "failed",
    ),
    "ignores every signal": (
        """
        import signal
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        def triple(n):
            while True: pass
        """,
        "timeout",
    ),
    "ends itself with 0 before it is asked": ("import sys\nsys.exit(0)\ndef triple(n): return 3 * n", "error"),
    "opens files without end": ("held = []\nwhile True: held.append(open('main.py'))", "error"),
    "opens files without end when called": (
        "held = []\ndef triple(n):\n    while True: held.append(open('main.py'))",
        "failed",
    ),
    "starts threads without end": (
        """
        import threading, time
        def triple(n):
            while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        """,
        ("failed", "timeout", "memory", "crashed"),
    ),
    "leaves threads behind that never end": (
        """
        import threading
        def spin():
            while True: pass
        for _ in range(4): threading.Thread(target=spin, daemon=True).start()
        def triple(n): return 3 * n
        """,
        "passed",
    ),
    "leaves processes behind in sessions of their own": (
        """
        import os, subprocess, sys, time
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0: time.sleep(60)
            os._exit(0)
        def triple(n): return 3 * n
        """,
        "passed",
    ),
    "deletes all in its folder": (
        """
        import os
        for name in os.listdir("."): os.remove(name)
        assert os.listdir(".") == []
        def triple(n): return 3 * n
        """,
        "passed",
    ),
    "prints without end when it is over": (
        """
        import atexit
        @atexit.register
        def last():
            while True: print("x" * 100_000)
        def triple(n): return 3 * n
        """,
        ("passed", "output"),
    ),
    "fills every pipe": (
        """
        import os
        for handle in range(3, 64):
            try:
                os.set_blocking(handle, False)
                for _ in range(100): os.write(handle, b"x" * 100_000)
            except OSError:
                pass
        os._exit(0)
        """,
        ("error", "crashed", "output"),
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_mean_harm(name: str) -> None:
    code, outcome = PROGRAMS[name]
    found = score_answer(TRIPLE, fenced(dedent(code)), limits=within(outcome))
    assert found.outcome in ((outcome,) if isinstance(outcome, str) else outcome), found
    assert found.detail.isprintable()
    assert 0 < len(found.detail) <= 300
    assert found.isolation == "process"
    # It can be kept whatever it holds.
    assert Outcome.model_validate_json(found.to_json()) == found


def test_prints_and_half_lines_do_not_disturb_the_tests() -> None:
    found = ran("def triple(n):\n    print('half a line', end='', flush=True)\n    return 3 * n\nprint('x' * 100_000)")
    assert found.passed
    closed = ran("import sys\nsys.stdout.close()\nsys.stdout = None\ndef triple(n): return 3 * n")
    assert closed.tests_passed == 3


CHEATS = {
    "equals everything": "class A:\n    def __eq__(self, other): return True\ndef triple(n): return A()",
    "is an int that equals everything": (
        "class A(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef triple(n): return A(1)"
    ),
    "says that it passed": "print('All 3 tests passed.')\ndef triple(n): return 0",
    "takes the counter of tests away": (
        "import builtins\nfor name in dir(builtins):\n"
        "    if 'test' in name: setattr(builtins, name, lambda f: lambda: None)\ndef triple(n): return 0"
    ),
    "replaces how values are written": (
        "import sys\nmain = sys.modules['__main__']\nmain.encode = lambda value: '0x15'\ndef triple(n): return 0"
    ),
    "replaces json and os": (
        "import json, os\nreal = os.write\njson.dumps = lambda *a, **k: '[]'\n"
        "os.write = lambda handle, data: real(handle, data.replace(b'0x0', b'0x15'))\ndef triple(n): return 0"
    ),
    "forges the report": """
        import json, os, re, sys
        frame = sys._getframe()
        while frame and "job" not in frame.f_locals:
            frame = frame.f_back
        mark = frame.f_locals["job"]["mark"]
        for at in range(10):
            for value in ("", "None", "0x1", "0x0", "True"):
                os.write(1, f"\\n{mark}{json.dumps(['saw', at, value, value])}\\n".encode())
        os.write(1, f"\\n{mark}{json.dumps(['end', -1, '', ''])}\\n".encode())
        def triple(n): return 0
    """,
    "forges the report and leaves": """
        import json, os, sys
        frame = sys._getframe()
        while frame and "job" not in frame.f_locals:
            frame = frame.f_back
        mark = frame.f_locals["job"]["mark"]
        for kind in ("parsed", "end"):
            os.write(1, f"\\n{mark}{json.dumps([kind, -1, '', ''])}\\n".encode())
        os._exit(0)
    """,
    "drops the tests": """
        import sys
        frame = sys._getframe()
        while frame and "job" not in frame.f_locals:
            frame = frame.f_back
        frame.f_locals["job"]["steps"].clear()
        def triple(n): return 0
    """,
    "looks for what is expected": """
        import gc, re
        text = open("main.py").read() + repr([o for o in gc.get_objects() if isinstance(o, (list, dict))])[:10**6]
        found = re.findall(r"== *(-?[0-9]+)", text)
        answers = iter(found)
        def triple(n): return int(next(answers, 0))
    """,
    "traces every line": """
        import sys
        def tracer(frame, event, argument):
            if "value" in frame.f_locals: frame.f_locals["value"] = 21
            return tracer
        sys.settrace(tracer)
        def triple(n): return 0
    """,
}


@pytest.mark.parametrize("name", CHEATS)
def test_code_that_cheats_does_not_pass(name: str) -> None:
    found = ran(CHEATS[name])
    assert found.outcome in ("failed", "error"), found
    assert found.tests_passed <= 1  # triple(0) is 0


def test_what_a_test_expects_is_not_in_the_program() -> None:
    steps = python_tests.read_steps("assert f(3) == 271828182845\nassert f('a') == ['unheard', 'of']\n")
    program = python_tests.program([RIGHT], setup="", names=("f",), steps=steps, mark="m")
    assert "f(3)" in program
    assert "271828182845" not in program
    assert hex(271828182845) not in program
    assert "unheard" not in program


def test_the_environment_is_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_API_KEY", "21")
    found = ran("import os\ndef triple(n): return int(os.environ.get('SECRET_API_KEY', 0))")
    assert (found.outcome, found.tests_passed) == ("failed", 1)
    assert "gave 0, not 21" in found.detail


@SANDBOX
def test_files_and_network_are_out_of_reach_in_the_sandbox(tmp_path: Path) -> None:
    private = tmp_path / "private.txt"
    private.write_text("21")
    target = tmp_path / "written.txt"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        attempts = (
            f"open({str(target)!r}, 'w').write('x')",
            f"os.unlink({str(private)!r})",
            f"open({str(private)!r}, 'a').write('x')",
            f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 5)",
            f"os.listdir({str(Path.home())!r})",
            *(
                f"open({place!r}, 'x').close(), os.unlink({place!r})"
                for place in ("/hostile", "/etc/hostile", "/var/tmp/hostile", str(Path.home() / "hostile"))
            ),
        )
        code = "import os, socket\nrefused = 0\n"
        code += "".join(f"try:\n    {one}\nexcept OSError:\n    refused += 1\n" for one in attempts)
        found = ran(f"{code}assert refused == {len(attempts)}, refused\n{RIGHT}", sandbox=True)
        assert found.passed, found
        assert str(found.isolation).startswith("sandbox")
        with pytest.raises(BlockingIOError):
            server.accept()
    assert not target.exists()
    assert private.read_text() == "21"


STATEMENTS = {
    "endless recursion": (
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n;",
        "timeout",
    ),
    "endless output": (
        "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT printf('%1000d', i) FROM n;",
        "output",
    ),
    "a cross join without end": (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n LIMIT 5000) SELECT count(*) FROM n a, n b, n c;",
        "timeout",
    ),
    "much memory": ("SELECT length(randomblob(900000000) || randomblob(900000000));", ("error", "memory")),
    "attaches": ("ATTACH '{target}' AS other;", "error"),
    "attaches another way": ("ATTACH DATABASE 'file:{target}?mode=rwc' AS other; CREATE TABLE other.t (a);", "error"),
    "copies itself": ("VACUUM INTO '{target}';", "error"),
    "loads code": ("SELECT load_extension('{target}');", "error"),
    "reads files": ("SELECT readfile('/etc/passwd');", "error"),
    "drops the tables": ("DROP TABLE people;", "failed"),
    "empties them": ("DELETE FROM people; SELECT name FROM people;", "failed"),
    "a statement that never ends": ("SELECT name FROM people /* and so on", "not_parsed"),
    "a string that never ends": ("SELECT 'name", "not_parsed"),
    "an open transaction": ("BEGIN; SELECT name FROM people;", "passed"),
    "nothing": (";;;", "failed"),
    "a null byte": ("SELECT '\0';", "failed"),
    "not SQL": ("def names(): pass", "not_parsed"),
    "no such column": ("SELECT surname FROM people;", "error"),
    "a thousand statements": ("SELECT 1;\n" * 1000, "failed"),
    "deep brackets": ("SELECT " + "(" * 100_000, ("error", "not_parsed")),
}


@pytest.mark.parametrize("name", STATEMENTS)
def test_statements_that_mean_harm(name: str, tmp_path: Path) -> None:
    target = tmp_path / "stolen.db"
    code, outcome = STATEMENTS[name]
    found = score_answer(NAMES, fenced(code.replace("{target}", str(target)), "sql"), limits=within(outcome))
    assert found.outcome in ((outcome,) if isinstance(outcome, str) else outcome), found
    assert not target.exists()
    assert found.detail.isprintable()
    assert found.tests == 2


def test_a_run_goes_on_past_all_of_them() -> None:
    harmful = [fenced(PROGRAMS[name][0]) for name in ("leaves", "crashes", "raises", "reads its input")]
    texts = [RIGHT, *harmful, *(text for text, _ in list(TEXTS.values())[:4]), RIGHT]
    outcomes = list(score_answers([(TRIPLE, text) for text in texts], jobs=2, sandbox="off"))
    assert [outcome.passed for outcome in outcomes] == [True, *([False] * 8), True]
    assert list(Path(tempfile.gettempdir()).iterdir()) == []
