"""The whole step and its command: faults, table, JSON."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distill.cli.doctor import table
from mlx_distill.config import DoctorConfig
from mlx_distill.doctor import machine, run
from mlx_distill.doctor.finding import Finding
from tests.doctor.calling import doctor


@pytest.mark.parametrize(
    "fault",
    [
        PermissionError(13, "Permission denied", "/proc/cpuinfo"),
        FileNotFoundError(2, "No such file"),
        subprocess.CalledProcessError(1, ["sysctl"]),
        subprocess.TimeoutExpired(["sysctl"], 10),
        ImportError("no module"),
        KeyError("MemTotal"),
        ValueError("two\nlines"),
        RuntimeError(),
    ],
)
def test_probe_that_fails_is_a_row_and_not_the_end(
    quick: None, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    names = [finding.name for finding in run.examine(DoctorConfig())]

    def fail() -> list[Finding]:
        raise fault

    monkeypatch.setattr(machine, "chip", fail)
    findings = run.examine(DoctorConfig())
    assert [finding.name for finding in findings] == names
    chip = findings[names.index("chip")]
    assert chip.state == "warning"
    assert chip.found.startswith(f"not found out, {type(fault).__name__}: ")
    assert "\n" not in chip.found
    assert run.lacking(findings) == []


def test_what_others_say_cannot_steer_the_terminal(
    quick: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hostile = "\x1b[2J\a\udcff name"
    monkeypatch.setattr(machine, "chip", lambda: [Finding("chip", "ok", hostile, hostile)])
    for arguments in ((), ("--json",)):
        result = doctor(*arguments)
        assert result.exit_code == 0
        assert "?[2J?? name" in result.stdout
        assert "\x1b" not in result.stdout


TEXTS = st.text(st.characters(min_codepoint=32, max_codepoint=0x2FF, exclude_categories=["C", "M", "Z"]), min_size=1)


@given(
    st.lists(
        st.builds(
            Finding, TEXTS, st.sampled_from(["ok", "warning", "missing"]), TEXTS, st.none() | TEXTS, st.booleans()
        ),
        min_size=1,
    )
)
def test_table_is_aligned(findings: list[Finding]) -> None:
    head, *lines = table(findings)
    state_at, found_at = head.index("state"), head.index("found")
    rows = iter(lines)
    for finding in findings:
        line = next(rows)
        assert line[:state_at].rstrip() == finding.name
        assert line[state_at:found_at].rstrip() == finding.state
        assert line[found_at:] == finding.found
        if finding.remedy is not None:
            assert next(rows) == " " * found_at + f"→ {finding.remedy}"
    assert next(rows, None) is None


def test_json_is_one_object_and_the_same_rows(quick: None) -> None:
    result = doctor("--json")
    assert result.stdout.count("\n") == 1
    told = json.loads(result.stdout)
    assert told["ready"] is True
    assert [Finding(**row) for row in told["findings"]] == run.examine(DoctorConfig())
    lines = doctor().stdout.splitlines()
    assert lines[:-2] == table(run.examine(DoctorConfig()))
    assert lines[-1] == "Ready:  mlx-distill demo"
