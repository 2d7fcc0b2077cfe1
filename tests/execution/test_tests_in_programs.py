"""The tests that a program brings are run, counted once, and cannot be faked by printing or leaving early."""

from __future__ import annotations

import pytest

from tests.execution.programs import run


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
