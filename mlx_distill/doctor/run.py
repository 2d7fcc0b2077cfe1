"""The step `doctor`.

Reads: the operating system, the environment, the installed packages, the caches; asks the Hub for one public page.
Writes: nothing.

A probe that fails is a row that says so, never the end. What a probe needs is therefore imported inside it: a broken
package must not take the others along.

Not found out: whether a key is accepted, and whether a certain model fits into memory.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

from mlx_distill.config import DoctorConfig
from mlx_distill.doctor import access, machine, packages
from mlx_distill.doctor.finding import Finding
from mlx_distill.doctor.mlx import mlx
from mlx_distill.progress import SILENT, Progress

#: What a probe may meet: the operating system, a broken package, or output that is not what it should be.
_FAULTS = (OSError, subprocess.SubprocessError, ImportError, AttributeError, RuntimeError, ValueError, LookupError)


def examine(config: DoctorConfig, progress: Progress = SILENT) -> list[Finding]:
    """Look at everything, in the order in which it is shown. A fault of a probe becomes its row."""
    probes: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("system", machine.system),
        ("chip", machine.chip),
        ("memory", machine.memory),
        ("disk", machine.disks),
        ("Python", packages.python),
        *((name, partial(packages.package, name)) for name in packages.PACKAGES),
        ("MLX device", partial(mlx, speed=config.speed, progress=progress)),
        ("Hub", partial(access.hub, progress)),
        ("HF_TOKEN", access.hub_token),
        ("ANTHROPIC_API_KEY", access.anthropic_key),
        ("student", access.students),
    ]
    return [_plain(finding) for name, probe in probes for finding in _guarded(name, probe)]


def lacking(findings: Iterable[Finding]) -> list[str]:
    """Names of the missing things without which nothing works."""
    return [finding.name for finding in findings if finding.required and finding.state == "missing"]


def _guarded(name: str, probe: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return probe()
    except _FAULTS as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        return [Finding(name, "warning", f"not found out, {type(error).__name__}: {reason}")]


def _plain(finding: Finding) -> Finding:
    """On one line, and without what would steer a terminal: much of it was said by other programs."""

    def plain(text: str) -> str:
        return "".join(letter if letter.isprintable() else "?" for letter in text)

    remedy = None if finding.remedy is None else plain(finding.remedy)
    return replace(finding, name=plain(finding.name), found=plain(finding.found), remedy=remedy)
