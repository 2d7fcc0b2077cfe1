"""`mlx-distill doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import DoctorConfig
from mlx_distill.progress import Progress

if TYPE_CHECKING:
    from mlx_distill.doctor.finding import Finding

_HEAD = ("what", "state", "found")


@make_command(
    DoctorConfig,
    examples="""
    mlx-distill doctor
    mlx-distill doctor --no-speed
    mlx-distill doctor --json
    """,
    keeps="Nothing was changed.",
)
def command(config: DoctorConfig, progress: Progress) -> Summary:
    """Show what this machine has, and how to get what it lacks.

    Exits 1 when something is missing without which nothing works. Of keys it says only whether they are set.
    """
    from mlx_distill.doctor.run import examine, lacking

    found = examine(config, progress)
    lacks = lacking(found)
    end = (
        f"Not ready. Nothing works without: {', '.join(dict.fromkeys(lacks))}." if lacks else "Ready:  mlx-distill demo"
    )
    data = {"ready": not lacks, "findings": [asdict(finding) for finding in found]}
    return Summary(data, [*table(found), "", end], failed=bool(lacks))


def table(findings: Sequence[Finding]) -> list[str]:
    """Aligned rows, each with what to do, if anything, on a line of its own: whole when copied, greppable in a pipe."""
    name_width = max(len(text) for text in [_HEAD[0], *(finding.name for finding in findings)])
    state_width = max(len(text) for text in [_HEAD[1], *(finding.state for finding in findings)])

    def row(name: str, state: str, found: str) -> str:
        return f"{name:<{name_width}}  {state:<{state_width}}  {found}"

    lines = [row(*_HEAD)]
    for finding in findings:
        lines.append(row(finding.name, finding.state, finding.found))
        if finding.remedy is not None:
            lines.append(row("", "", f"→ {finding.remedy}"))
    return lines
