"""What a teacher cannot be asked for is refused before anything is sent, fetched or made."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_distill.cli.main import main
from mlx_distill.collect.run import collect, estimate_from_spec
from mlx_distill.config import CollectConfig
from mlx_distill.errors import ConfigError
from mlx_distill.teachers.recorded import RecordedTeacher
from tests.servers.messages_server import MODEL

CLAUDE = f"anthropic:{MODEL}"
PROMPTS = 6


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"question {n}\n" for n in range(PROMPTS)), encoding="utf-8")
    return path


REFUSED = [
    (CLAUDE, 1, 0.8, "takes no temperature", "--samples alone"),
    (CLAUDE, 3, 0.0, "takes no temperature", "--samples alone"),
    ("recorded:data/starter", 2, None, "has one answer to a prompt, not 2", "Leave --samples away"),
    ("recorded:data/starter", 1, 0.8, "takes no temperature", "Leave --temperature away"),
    ("mlx:no-such-model", 2, None, "the 2 greedy answers", "--temperature 0.8"),
    ("mlx:no-such-model", 2, 0.0, "the 2 greedy answers", "--temperature 0.8"),
    ("openai:gpt", 2, 0.0, "the 2 greedy answers", "--temperature 0.8"),
]


@pytest.mark.parametrize(("teacher", "samples", "temperature", "words", "hint"), REFUSED)
@pytest.mark.parametrize("dry", [False, True])
def test_what_a_teacher_cannot_do_is_refused_before_anything_is_done(
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    teacher: str,
    samples: int,
    temperature: float | None,
    words: str,
    hint: str,
    dry: bool,
) -> None:
    for name in ("ANTHROPIC_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    out = prompts.parent / "out"
    arguments = [
        *("collect", "--prompts", str(prompts), "--teacher", teacher, "--out", str(out), "--samples", str(samples)),
        *(() if temperature is None else ("--temperature", str(temperature))),
        "--dry-run" if dry else "--accept-terms",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert words in result.stderr
    assert hint in result.stderr
    assert "Traceback" not in result.output
    assert not out.exists()


async def test_of_a_teacher_that_is_open_what_it_is_counts(prompts: Path) -> None:
    out = prompts.parent / "out"
    config = CollectConfig(prompts=prompts, teacher="openai:m", out=out, samples=2, temperature=0.5)
    with pytest.raises(ConfigError, match="'recorded:data/starter' takes no temperature"):
        await collect(config, RecordedTeacher("data/starter"))
    assert not out.exists()


@pytest.mark.parametrize(
    ("teacher", "samples", "temperature"),
    [(CLAUDE, 3, None), ("mlx:m", 1, 0.8), ("mlx:m", 1, 0.0), ("mlx:m", 3, 0.8), ("openai:m", 3, None),
     ("openai:m", 3, 0.8), ("openai:m", 1, 0.0)],
)  # fmt: skip
def test_what_a_teacher_can_do_is_not_refused(
    prompts: Path, monkeypatch: pytest.MonkeyPatch, teacher: str, samples: int, temperature: float | None
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    config = CollectConfig(prompts=prompts, teacher=teacher, samples=samples, temperature=temperature)
    assert estimate_from_spec(config).requests == samples * PROMPTS
