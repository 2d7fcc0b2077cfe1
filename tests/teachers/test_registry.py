"""A spec opens the teacher it names, or says which there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlx_distill.errors import ConfigError
from mlx_distill.teachers import registry
from mlx_distill.teachers.recorded import RecordedTeacher
from mlx_distill.teachers.registry import check_sampling, open_teacher


def test_opens_a_recorded_teacher(tmp_path: Path) -> None:
    record = tmp_path / "answers.jsonl"
    record.write_text('{"prompt": "a", "answer": "b"}\n', encoding="utf-8")
    teacher = open_teacher(f"recorded:{record}")
    assert isinstance(teacher, RecordedTeacher)
    assert teacher.spec == f"recorded:{record}"


@pytest.mark.parametrize("spec", ["opnai:gpt", "", "claude-sonnet-4-6", ":x"])
def test_an_unknown_provider_is_refused_and_the_known_are_named(spec: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_teacher(spec)
    assert "anthropic:NAME" in str(caught.value)
    assert "recorded:NAME" in str(caught.value)


def test_a_near_miss_is_guessed() -> None:
    with pytest.raises(ConfigError, match="Did you mean anthropic"):
        open_teacher("antropic:claude-sonnet-4-6")


@pytest.mark.parametrize("spec", ["anthropic:", "recorded: "])
def test_a_provider_alone_is_not_enough(spec: str) -> None:
    with pytest.raises(ConfigError, match="names nothing"):
        open_teacher(spec)


def test_what_is_known_of_a_kind_is_of_a_teacher_that_there_is() -> None:
    kinds = {*registry.TAKES_BASE_URL, *registry.NO_TEMPERATURE, *registry.ONE_ANSWER, *registry.GREEDY}
    assert kinds <= registry.TEACHERS.keys()


@pytest.mark.parametrize("kind", [*registry.TEACHERS, "somebodys-own"])
def test_one_answer_as_it_comes_can_be_asked_of_any_teacher(kind: str) -> None:
    check_sampling(f"{kind}:x", samples=1, temperature=None)


def test_of_a_teacher_that_is_not_in_the_table_nothing_is_refused() -> None:
    check_sampling("somebodys-own:x", samples=5, temperature=None)
    check_sampling("somebodys-own:x", samples=5, temperature=0.5)


def test_the_sdk_is_imported_only_by_the_teacher_that_needs_it() -> None:
    script = (
        "import sys, mlx_distill.collect.run, mlx_distill.teachers.recorded\n"
        "sys.exit('anthropic' in sys.modules or 'mlx' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
