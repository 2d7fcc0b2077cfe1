"""Every answer that ships is whole and true: its Python passes, its SQL runs, its fences are closed."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from mlx_distill.code_blocks import code_blocks, prose, source
from mlx_distill.execution import Execution, Limits, run_python, run_sql

ANSWERS = Path(__file__).parent.parent / "data" / "starter" / "answers"
FILES = sorted(ANSWERS.glob("*.md"))
_FRONT_MATTER = re.compile(r"\A\+\+\+\n(.*?\n)\+\+\+\n(.*)\Z", re.DOTALL)

#: Names of files → how their Python and SQL ran.
Runs = dict[str, list[Future[Execution]]]


def parts(path: Path) -> tuple[dict[str, str], str]:
    match = _FRONT_MATTER.match(path.read_text(encoding="utf-8"))
    assert match, "no TOML front matter between lines of +++"
    return tomllib.loads(match[1]), match[2]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """Runs of the chosen answers, two at a time."""
    here = [item for item in request.session.items if item.path == Path(__file__)]
    wanted = [item for item in here if "runs" in getattr(item, "fixturenames", ())]
    chosen: set[Path] = {getattr(item, "callspec").params["path"] for item in wanted}  # noqa: B009 - not declared
    with ThreadPoolExecutor(2) as pool:
        started: Runs = {}
        for path in sorted(chosen):
            blocks = code_blocks(parts(path)[1])
            started[path.name] = [
                pool.submit(run, script, limits=Limits(seconds=20))
                for run, script in ((run_python, source(blocks, "python")), (run_sql, source(blocks, "sql")))
                if script
            ]
        yield started


def test_they_are_here() -> None:
    assert len(FILES) >= 36


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_file_is_well_formed(path: Path) -> None:
    front, answer = parts(path)
    assert set(front) == {"id", "prompt"}
    assert front["id"] == path.stem
    assert front["prompt"].strip()
    blocks = code_blocks(answer)
    assert all(block.closed for block in blocks)
    assert all(block.language for block in blocks), "a fence names no language"
    assert len(prose(answer, blocks).split()) >= 20
    assert answer.endswith("\n")
    assert not answer.endswith("\n\n")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_code_runs_and_passes(path: Path, runs: Runs) -> None:
    for run in runs[path.name]:
        execution = run.result()
        assert execution.passed, f"{execution.problem}\n{execution.stdout}\n{execution.stderr}"
        assert not execution.tests_skipped
