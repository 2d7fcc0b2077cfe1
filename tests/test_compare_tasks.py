"""Tasks in a comparison: answers are run against hidden tests, held-out answers are read, samples are drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load

from mlx_distill.compare.run import compare
from mlx_distill.config import CompareConfig
from mlx_distill.errors import ConfigError, InputError, MlxDistillError, TeacherError
from mlx_distill.evaluation import load_tasks
from mlx_distill.layout import ComparisonFolder, DataFolder, read_rows
from mlx_distill.records import Generation
from mlx_distill.scores import HeldOutLoss, ScoredAnswer
from mlx_distill.settings import parse_settings
from tests.training.runs import fused_run

TASKS = '''
format = 1
kind = "python"
family = "sums"

[[task]]
id = "add"
difficulty = "easy"
prompt = "Write add(a, b)."
defines = ["add"]
tests = """
assert add(1, 2) == 3
assert add(-1, 1) == 0
"""
reference = "def add(a, b):\\n    return a + b"
wrong = ["def add(a, b):\\n    return a - b"]

[[task]]
id = "double"
difficulty = "easy"
prompt = "Write double(a)."
defines = ["double"]
tests = "assert double(4) == 8"
reference = "def double(a):\\n    return 2 * a"
wrong = ["def double(a):\\n    return a"]
'''

#: What the recorded teacher says: one answer passes, one fails.
SAID = {
    "Write add(a, b).": "```python\ndef add(a, b):\n    return a + b\n```",
    "Write double(a).": "```python\ndef double(a):\n    return a * 3\n```",
    "Say hello.": "Hello.",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A finished and fused run. Do not write into it."""
    return fused_run(tmp_path_factory.mktemp("compared"), tiny_model)


def write_answers(path: Path, said: dict[str, str]) -> str:
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in said.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"recorded:{path}"


@pytest.fixture
def config(run: Path, tmp_path: Path) -> CompareConfig:
    (tmp_path / "tasks.toml").write_text(TASKS, encoding="utf-8")
    return CompareConfig(
        run=run,
        eval=str(tmp_path / "tasks.toml"),
        teacher=write_answers(tmp_path / "said.jsonl", SAID),
        max_tokens=12,
        out=tmp_path / "visuals",
    )


def changed(config: CompareConfig, **changes: Any) -> CompareConfig:
    return CompareConfig.model_validate({**config.model_dump(), **changes})


def files(config: CompareConfig) -> ComparisonFolder:
    assert config.out is not None
    return ComparisonFolder(config.out)


def outcomes(config: CompareConfig) -> dict[tuple[str, str, int], ScoredAnswer]:
    found = read_rows(files(config).outcomes, ScoredAnswer)
    by_key = {(row.contender, row.outcome.task_id, row.sample): row for row in found}
    assert len(by_key) == len(found)
    return by_key


def test_answers_to_tasks_are_tested(config: CompareConfig) -> None:
    record = compare(config)
    found = outcomes(config)
    assert set(found) == {(c, t, 0) for c in ("teacher", "base", "distilled") for t in ("add", "double")}
    assert found["teacher", "add", 0].outcome.outcome == "passed"
    assert found["teacher", "double", 0].outcome.outcome == "failed"
    # A random model writes no program.
    assert not any(row.outcome.passed for (who, _, _), row in found.items() if who != "teacher")
    answers = {(row.contender, row.prompt.id): row for row in read_rows(files(config).generations, Generation)}
    assert all(row.answer_sha256 == answers[who, task].answer_sha256 for (who, task, _), row in found.items())
    assert record.tasks_sha256 == {task: found["base", task, 0].task_sha256 for task in ("add", "double")}
    assert record.evals == (config.eval,) and record.prompts is None


def test_only_what_changed_is_tested_again(config: CompareConfig, tmp_path: Path) -> None:
    compare(config)
    before = outcomes(config)
    marked = {key: row.model_copy(update={"family": "kept"}) for key, row in before.items()}
    files(config).outcomes.write_text("".join(row.to_json() + "\n" for row in marked.values()), encoding="utf-8")
    other = write_answers(
        tmp_path / "other.jsonl", {**SAID, "Write double(a).": "```python\ndef double(a): return 2*a\n```"}
    )
    compare(changed(config, teacher=other))
    after = outcomes(config)
    assert after["teacher", "double", 0].outcome.passed
    assert {key for key, row in after.items() if row.family != "kept"} == {("teacher", "double", 0)}
    path = tmp_path / "tasks.toml"
    path.write_text(TASKS.replace("assert double(4) == 8", "assert double(5) == 15"), encoding="utf-8")
    compare(config)
    assert outcomes(config)["teacher", "double", 0].outcome.passed, "the tests are others now"
    assert outcomes(config)["teacher", "add", 0].family == "kept"


def test_without_tasks_no_outcome_is_left(config: CompareConfig, tmp_path: Path) -> None:
    compare(config)
    (tmp_path / "prompts.txt").write_text("Say hello.\n", encoding="utf-8")
    compare(changed(config, eval="", prompts=tmp_path / "prompts.txt"))
    assert not files(config).outcomes.exists()


def test_a_task_that_stands_in_the_prompt_file_is_asked_once(config: CompareConfig, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"id": "add", "family": "mine", "text": "Write add(a, b)."},
        {"id": "hi", "family": "hi", "text": "Say hello."},
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    compare(changed(config, prompts=prompts))
    asked = [row.prompt.id for row in read_rows(files(config).generations, Generation) if row.contender == "base"]
    assert asked == ["add", "hi", "double"]
    assert outcomes(config)["teacher", "add", 0].outcome.passed
    rows[0]["text"] = "Write something else."
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(InputError, match="id add is that of another prompt"):
        compare(changed(config, prompts=prompts))


def test_a_recorded_teacher_need_not_know_the_tasks_but_the_prompts(config: CompareConfig, tmp_path: Path) -> None:
    known = {key: value for key, value in SAID.items() if "double" not in key}
    compare(changed(config, teacher=write_answers(tmp_path / "known.jsonl", known)))
    assert ("teacher", "double", 0) not in outcomes(config)
    assert ("base", "double", 0) in outcomes(config)
    (tmp_path / "prompts.txt").write_text("Say something never recorded.\n", encoding="utf-8")
    with pytest.raises(TeacherError, match="1 of 3 prompts unanswered"):
        compare(changed(config, prompts=tmp_path / "prompts.txt"))


@pytest.mark.slow
def test_samples_are_drawn_alike_whatever_is_beside_them(config: CompareConfig) -> None:
    drawn = changed(config, teacher=None, samples=3, temperature=1.0)
    compare(drawn)
    first = {(r.contender, r.prompt.id, r.sample): r.text for r in read_rows(files(drawn).generations, Generation)}
    assert len(first) == 2 * 2 * 3
    assert len(set(first.values())) > 6, "samples differ"
    assert {key[2] for key in outcomes(drawn)} == {0, 1, 2}
    # Of the answers some are gone: those made in their place, in another batch, are the same.
    kept = [r for r in read_rows(files(drawn).generations, Generation) if r.sample != 1]
    files(drawn).generations.write_text("".join(row.to_json() + "\n" for row in kept), encoding="utf-8")
    compare(changed(drawn, batch_size=1))
    again = {(r.contender, r.prompt.id, r.sample): r.text for r in read_rows(files(drawn).generations, Generation)}
    assert again == first
    compare(changed(drawn, seed=1))
    other = {(r.contender, r.prompt.id, r.sample): r.text for r in read_rows(files(drawn).generations, Generation)}
    assert set(other) == set(first) and sum(other[key] != first[key] for key in first) > 6


def test_fewer_samples_keep_the_first(config: CompareConfig) -> None:
    drawn = changed(config, teacher=None, samples=3, temperature=1.0)
    compare(drawn)
    before = {(r.contender, r.prompt.id, r.sample): r for r in read_rows(files(drawn).generations, Generation)}
    compare(changed(drawn, samples=2))
    after = {(r.contender, r.prompt.id, r.sample): r for r in read_rows(files(drawn).generations, Generation)}
    assert after == {key: row for key, row in before.items() if key[2] < 2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"eval": "", "prompts": None}, "nothing is asked"),
        ({"samples": 2}, "greedy samples are all alike"),
        ({"samples": 0}, "samples = 0"),
        ({"temperature": -1}, "temperature = -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(config: CompareConfig, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_settings(CompareConfig, {**config.model_dump(), **changes}, where="usage")


# Held-out answers


def test_the_perplexity_of_held_out_answers_is_mlx_lms(config: CompareConfig, run: Path, tiny_model: Path) -> None:
    compare(config)
    found = read_rows(files(config).held_out, HeldOutLoss)
    data = Path(json.loads((run / "run.json").read_text(encoding="utf-8"))["config"]["data"])
    split = next(path for name in ("test", "valid") if (path := DataFolder(data).split(name)).exists())
    rows = [json.loads(line)["messages"] for line in split.read_text(encoding="utf-8").splitlines()]
    assert {row.contender for row in found} == {"base", "distilled"}
    assert len(found) == 2 * len(rows)
    for contender, folder in (("base", tiny_model), ("distilled", run / "fused")):
        model, tokenizer = load(str(folder))
        model.set_dtype(mx.float32)
        expected: list[float] = []
        count: list[float] = []
        for messages in rows:
            whole = tokenizer.apply_chat_template(messages, tokenize=True)
            begun = tokenizer.apply_chat_template(messages[:-1], tokenize=True, add_generation_prompt=True)
            logits = model(mx.array([whole[:-1]]))[0]
            targets = mx.array(whole[1:])
            nll = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
            own = [row for row in found if row.contender == contender][len(expected)]
            # The template ends a turn with what is no part of the answer.
            end = len(begun) - 1 + own.tokens
            assert end <= len(whole) - 1
            expected.append(float(nll[len(begun) - 1 : end].sum().item()))
            count.append(own.nll)
        assert count == pytest.approx(expected, rel=1e-4)


def test_held_out_answers_are_read_once_and_off_when_told(config: CompareConfig) -> None:
    compare(changed(config, held_out=1))
    first = read_rows(files(config).held_out, HeldOutLoss)
    assert [row.contender for row in first] == ["base", "distilled"]
    marked = [row.model_copy(update={"nll": 12345.0}) for row in first]
    files(config).held_out.write_text("".join(row.to_json() + "\n" for row in marked), encoding="utf-8")
    compare(changed(config, held_out=1))
    assert read_rows(files(config).held_out, HeldOutLoss) == marked
    compare(changed(config, held_out=0))
    assert not files(config).held_out.exists()


# Others


def test_others_answer_beside(config: CompareConfig, run: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = write_answers(tmp_path / "other.jsonl", SAID)
    record = compare(changed(config, others=f"again={run}, plain={tiny_model},second={other},mine=mlx:{tiny_model}"))
    assert list(record.models) == ["teacher", "base", "distilled", "again", "plain", "second", "mine"]
    said = {(r.contender, r.prompt.id): r.text for r in read_rows(files(config).generations, Generation)}
    for task in ("add", "double"):
        assert said["again", task] == said["distilled", task]
        assert said["plain", task] == said["mine", task] == said["base", task]
        assert said["second", task] == said["teacher", task]
    assert outcomes(config)["second", "add", 0].outcome.passed
    assert math.isfinite(record.seconds["again"])
    compare(config)
    assert {row.contender for row in read_rows(files(config).generations, Generation)} == {
        "teacher",
        "base",
        "distilled",
    }


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ("adapters/x", "is not NAME=SPEC"),
        ("=adapters/x", "is not NAME=SPEC"),
        ("a b=x", "is not NAME=SPEC"),
        ("../up=x", "is not NAME=SPEC"),
        ("base=x", "'base' is taken"),
        ("one=x,one=y", "'one' is taken"),
        ("one=/nowhere/at/all", "nowhere"),
    ],
)
def test_others_that_cannot_be_are_refused(config: CompareConfig, others: str, said: str) -> None:
    with pytest.raises(MlxDistillError, match=said):
        compare(changed(config, others=others))
    assert not files(config).generations.exists()


def test_a_budget_that_cannot_be_held_asks_nobody(config: CompareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not-a-key")
    with pytest.raises(ConfigError, match="no listed price"):
        compare(changed(config, teacher="openai:nobody-knows-this", max_cost=1))


def test_nothing_is_sent_that_could_pass_the_budget(config: CompareConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server would refuse: nobody listens there."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "not-a-key")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(
        TeacherError, match=r"2 of 2 prompts unanswered: add, double\. The budget of \$0 left no room for 2"
    ):
        compare(changed(config, teacher="anthropic:claude-sonnet-4-6", max_cost=0))


def test_the_shipped_tasks_are_read(config: CompareConfig) -> None:
    """Those of the package, and a file beside them; the models are not asked."""
    from mlx_distill.compare.questions import questions_of, task_files

    both = changed(config, eval=f"builtin,{config.eval}")
    questions = questions_of(both)
    assert len(questions.tasks) == len(load_tasks()) + 2
    assert [prompt.id for prompt in questions.prompts][-2:] == ["add", "double"]
    assert len(task_files(both.eval)) > 2
