"""Verification: right answers pass, wrong ones fail with their reason, and a runner that errs is refused."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import pytest
from pydantic import ValidationError

from mlx_distill.config import Confinement
from mlx_distill.errors import DependencyError, IsolationError
from mlx_distill.execution import Limits, SandboxSupport, sandbox_support
from mlx_distill.progress import Bar, Progress
from mlx_distill.quality import canaries, verify
from mlx_distill.quality.canaries import BASIC, Canary, confinement
from mlx_distill.quality.verify import Verification, choose_isolation, verify_answers

NO_SANDBOX = SandboxSupport(None, "The package nono-py is not installed.", installed=False)
NO_KERNEL = SandboxSupport(None, "This kernel has no Landlock.", installed=True)
HAS_SANDBOX = sandbox_support().problem is None
needs_sandbox = pytest.mark.skipif(not HAS_SANDBOX, reason="the extra 'sandbox' is not installed, or has no kernel")


class Told(Progress):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.tasks: list[tuple[str, float | None]] = []
        self.advanced = 0

    @contextmanager
    def task(self, title: str, total: float | None = None, *, unit: str = "") -> Iterator[Bar]:
        self.tasks.append((title, total))
        told = self

        class Counting(Bar):
            def advance(self, amount: float = 1, **fields: str) -> None:
                told.advanced += 1

        yield Counting()

    def say(self, line: str) -> None:
        self.said.append(line)


def python(*blocks: str) -> str:
    return "Some words.\n\n" + "\n\nMore words.\n\n".join(f"```python\n{block}\n```" for block in blocks) + "\n"


@pytest.fixture(autouse=True)
def unheard(monkeypatch: pytest.MonkeyPatch) -> None:
    """What canaries sang in other tests does not count here."""
    monkeypatch.setattr(verify, "_sung", set())


def use_canaries(monkeypatch: pytest.MonkeyPatch, *chosen: Canary, confined: tuple[Canary, ...] = ()) -> None:
    """Other canaries in place of the real ones."""

    @contextmanager
    def these() -> Iterator[tuple[Canary, ...]]:
        yield confined

    monkeypatch.setattr(verify, "BASIC", chosen)
    monkeypatch.setattr(verify, "confinement", these)


def choose(sandbox: Confinement, progress: Progress | None = None) -> bool:
    with ThreadPoolExecutor(2) as pool:
        return choose_isolation(sandbox, pool=pool, progress=progress or Progress())


GOOD = Canary("a right program passes", "pass", "passed")
WRONG = Canary("one and one is three", "assert 1 + 1 == 3", "passed")


def test_each_answer_gets_its_verdict_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    use_canaries(monkeypatch, GOOD)
    answers = {
        "wrong": python("def add(a, b):\n    return a - b", "def test_add():\n    assert add(1, 2) == 3"),
        "right": python("def add(a, b):\n    return a + b", "def test_add():\n    assert add(1, 2) == 3"),
        "words": "No code at all.",
        "sql": "```sql\nSELECT 1;\n```",
        "package": python("import numpy_of_another_kind"),
        "syntax": python("def ("),
        "unclosed": "```python\nassert True",
        "session": "```python\n>>> 1 + 1\n3\n```",
    }
    told = Told()
    found = verify_answers(answers, sandbox="off", progress=told)
    assert list(found) == list(answers)
    assert {identity: one.passed for identity, one in found.items()} == {
        "wrong": False,
        "right": True,
        "words": None,
        "sql": None,
        "package": False,
        "syntax": False,
        "unclosed": True,
        "session": None,
    }
    assert found["right"].detail == "It ran to its end; 1 test passed."
    assert found["right"].tests == 1
    assert found["wrong"].detail == "1 of 1 tests failed."
    assert "numpy_of_another_kind" in found["package"].detail
    assert found["syntax"].detail.startswith("SyntaxError")
    assert {one.isolation for one in found.values() if one.passed is not None} == {"process"}
    assert found["words"] == Verification(passed=None, detail="It holds no Python.")
    assert told.tasks == [("Verifying", 5)]
    assert told.advanced == 5


def test_without_python_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    use_canaries(monkeypatch, WRONG)
    assert verify_answers({}, sandbox="auto") == {}
    assert verify_answers({"a": "words", "b": "```python\n\n```"}, sandbox="auto")["b"].passed is None


def test_a_verification_does_not_change() -> None:
    one = Verification(passed=True, detail="x")
    with pytest.raises(ValidationError):
        one.passed = False  # type: ignore[misc]


def test_many_answers_use_as_many_processes_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, lock = 0, 0, threading.Lock()
    real = verify.run_python

    def counted(*arguments: object, **options: object) -> object:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        try:
            return real(*arguments, **options)  # type: ignore[arg-type]
        finally:
            with lock:
                running -= 1

    use_canaries(monkeypatch, GOOD)
    monkeypatch.setattr(verify, "run_python", counted)
    answers = {str(n): python(f"import time\ntime.sleep(0.1)\nassert {n} != 7") for n in range(12)}
    found = verify_answers(answers, sandbox="off", workers=3)
    assert [identity for identity, one in found.items() if not one.passed] == ["7"]
    assert most == 3


def test_an_error_while_running_stops_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def failing(code: str, **_: object) -> object:
        ran.append(code)
        raise KeyboardInterrupt

    use_canaries(monkeypatch, GOOD)
    monkeypatch.setattr(verify, "run_python", failing)
    with pytest.raises(KeyboardInterrupt):
        verify_answers({str(n): python(str(n)) for n in range(1000)}, sandbox="off")
    assert len(ran) < 20


def test_the_real_canaries_sing_without_a_sandbox() -> None:
    assert len(BASIC) >= 7
    assert choose("off") is False


@pytest.mark.parametrize("canary", BASIC, ids=lambda canary: canary.name)
def test_each_canary_notices_another_outcome(canary: Canary) -> None:
    other = "failed" if canary.outcome != "failed" else "passed"
    assert dataclasses.replace(canary, outcome=other).sings(sandbox=False) is not None
    assert dataclasses.replace(canary, harmless=lambda: False).sings(sandbox=False) is not None


def test_a_wrong_canary_refuses_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    use_canaries(monkeypatch, GOOD, WRONG)
    with pytest.raises(IsolationError, match=r"the check that one and one is three ended otherwise \(failed, Assert"):
        verify_answers({"a": python("pass")}, sandbox="off")


def test_a_leaking_environment_is_noticed() -> None:
    canary = next(canary for canary in BASIC if "environment" in canary.name)
    leak = "import os\nos.environ['API_KEY'] = 'x'\n"
    assert canary.sings(sandbox=False) is None
    assert dataclasses.replace(canary, source=leak + dedent(canary.source)).sings(sandbox=False) is not None


def test_a_sandbox_that_is_required_and_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    use_canaries(monkeypatch, GOOD)
    monkeypatch.setattr(verify, "sandbox_support", lambda: NO_SANDBOX)
    with pytest.raises(DependencyError, match="nono-py"):
        choose("required")
    monkeypatch.setattr(verify, "sandbox_support", lambda: NO_KERNEL)
    with pytest.raises(IsolationError, match="Landlock"):
        choose("required")


def test_a_sandbox_that_may_be_missing_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    use_canaries(monkeypatch, GOOD)
    for support, said in (
        (NO_SANDBOX, []),
        (NO_KERNEL, ["This kernel has no Landlock. Programs run without a sandbox."]),
    ):
        monkeypatch.setattr(verify, "sandbox_support", lambda support=support: support)
        told = Told()
        assert choose("auto", told) is False
        assert told.said[:-1] == said
        assert "(isolation: process; not covered: reading and writing any file the user can, network" in told.said[-1]


@needs_sandbox
def test_the_sandbox_is_used_where_it_is() -> None:
    found = verify_answers({"a": python("def test_it():\n    assert True")}, sandbox="auto")
    assert found["a"].passed is True
    assert found["a"].isolation == f"sandbox ({sandbox_support().mechanism})"
    assert verify_answers({"a": python("pass")}, sandbox="required")["a"].isolation == found["a"].isolation


@needs_sandbox
def test_a_sandbox_that_leaks_is_refused_or_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    leak = Canary("nothing is written outside", "raise SystemExit('wrote')", "passed")
    use_canaries(monkeypatch, GOOD, confined=(leak,))
    with pytest.raises(IsolationError, match="nothing is written outside"):
        choose("required")
    told = Told()
    found = verify_answers({"a": python("pass")}, sandbox="auto", progress=told)
    assert found["a"].isolation == "process"
    assert len(told.said) == 2
    assert "nothing is written outside" in told.said[0]
    assert "(isolation: process;" in told.said[1]


@needs_sandbox
def test_a_sandbox_that_cannot_be_tried_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_sockets(*_: object, **__: object) -> object:
        raise OSError(24, "Too many open files")

    use_canaries(monkeypatch, GOOD)
    monkeypatch.setattr(verify, "confinement", confinement)
    monkeypatch.setattr(canaries.socket, "create_server", no_sockets)
    told = Told()
    assert choose("auto", told) is False
    assert "Too many open files" in told.said[0]


@needs_sandbox
def test_the_canaries_of_confinement_pass_in_the_sandbox() -> None:
    with confinement() as confined:
        assert len(confined) == 3
        for canary in confined:
            assert canary.sings(sandbox=True) is None, canary.name


def test_the_canaries_of_confinement_notice_that_there_is_none() -> None:
    with confinement() as confined:
        for canary in confined:
            assert canary.sings(sandbox=False) is not None, canary.name


def test_the_limits_are_those_of_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    use_canaries(monkeypatch, GOOD)
    monkeypatch.setattr(verify, "LIMITS", Limits(seconds=0.7, cpu_seconds=5))
    found = verify_answers({"a": python("while True: pass"), "b": python("pass")}, sandbox="off")
    assert (found["a"].passed, found["b"].passed) == (False, True)
    assert found["a"].detail == "It ran longer than 0.7 s."


def test_secrets_of_the_caller_do_not_reach_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    use_canaries(monkeypatch, GOOD)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "the-key-of-the-caller")
    shout = "import os\nraise ValueError(' '.join(os.environ.values()))"
    found = verify_answers({"a": python(shout)}, sandbox="off")
    assert found["a"].passed is False
    assert "the-key-of-the-caller" not in found["a"].to_json()
    assert os.environ["ANTHROPIC_API_KEY"] == "the-key-of-the-caller"


@pytest.mark.parametrize("sandbox", ["off", pytest.param("required", marks=needs_sandbox)])
def test_shipped_answers_pass(sandbox: Confinement, monkeypatch: pytest.MonkeyPatch) -> None:
    use_canaries(monkeypatch, GOOD, confined=(GOOD,))
    folder = Path(__file__).parents[2] / "data" / "starter" / "answers"
    names = ["explain-python-gil--alternative", "free-time-slots--tests", "async-bounded-map", "java-lru-cache"]
    answers = {name: (folder / f"{name}.md").read_text(encoding="utf-8") for name in names}
    found = verify_answers(answers, sandbox=sandbox)
    assert [one.passed for one in found.values()] == [True, True, True, None]


def test_canaries_sing_once_a_process_unless_one_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    sung: list[str] = []
    sings = Canary.sings

    def counted(canary: Canary, *, sandbox: bool) -> object:
        sung.append(canary.name)
        return sings(canary, sandbox=sandbox)

    monkeypatch.setattr(Canary, "sings", counted)
    use_canaries(monkeypatch, WRONG)
    for _ in range(2):
        with pytest.raises(IsolationError, match="one and one is three"):
            choose("off")
    use_canaries(monkeypatch, GOOD)
    for _ in range(3):
        assert choose("off") is False
    assert sung == [WRONG.name, WRONG.name, GOOD.name]
