"""Judges that choose among a collection's answers: the rubric, and models through a ledger under one wall."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_distill.cli.main import main
from mlx_distill.collect.run import collect
from mlx_distill.config import CollectConfig
from mlx_distill.errors import ConfigError, DependencyError, IsolationError, TeacherError
from mlx_distill.execution import sandbox_support
from mlx_distill.judges.choosing import ModelScorer, RubricScorer, open_scorer
from mlx_distill.judges.llm import LlmJudge
from mlx_distill.layout import DataFolder
from mlx_distill.ledger import Ledger
from mlx_distill.manifest import Manifest
from mlx_distill.pricing import price_of
from mlx_distill.records import Reply, Request, Usage
from tests.collect.sampled import Sampled, config_for, rows_of
from tests.evaluation.asked import fenced
from tests.judges.judging import PRICED, Panellist, by_quality, question_of, refusal, scores
from tests.servers.chat_server import MODEL, Answer, ChatServer, completion

#: A panellist scores each by its number.
ANSWERS = {"x": ["It is 3.", "It is 7.5.", "It is 7.5!"], "y": ["It is 2.", "It is 1.", "It is 2."]}
BEST = [("x", "It is 7.5."), ("y", "It is 2.")]

#: What the rubric looks at: code that runs, names, documentation.
GOOD = (
    "Doubling is a product.\n\n"
    + fenced(
        'def double(n: int) -> int:\n    """Return twice n."""\n    return 2 * n\n\n\n'
        "assert double(2) == 4\nassert double(0) == 0"
    )
    + "\nIt takes constant time."
)
POOR = fenced("def double(n):\n    return 2 * m\n\nassert double(2) == 4")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "id": "X"}\n{"prompt": "y", "id": "Y"}\n', encoding="utf-8")
    return tmp_path


def config(folder: Path, **changes: object) -> CollectConfig:
    return config_for(folder, "p.jsonl", 3, **{"choose": "best", "judge": "scripted:judge", **changes})


async def judged(settings: CollectConfig, panellist: Panellist, teacher: Sampled | None = None) -> Manifest:
    return await collect(settings, teacher or Sampled({}), scorer=ModelScorer(LlmJudge(panellist), settings))


async def test_the_best_by_a_model_is_a_row_and_nothing_is_asked_twice(folder: Path) -> None:
    panellist = Panellist()
    manifest = await judged(config(folder), panellist, Sampled(ANSWERS))
    assert rows_of(config(folder)) == BEST
    assert (manifest.chosen_by, manifest.unscored, manifest.judge_usd) == ("scripted:judge", 0, 0)
    # Five: equal answers are one question.
    assert len(panellist.asked) == 5
    again = Panellist(answer=lambda _: pytest.fail("asked"))
    assert await judged(config(folder), again) == manifest


async def test_a_judge_is_told_neither_the_teacher_nor_the_sample(folder: Path) -> None:
    panellist = Panellist()
    answers = {"x": ["I am scripted:x: 1.", "By scripted:x: 2.", "3."], "y": ["1.", "1.", "1."]}
    await judged(config(folder), panellist, Sampled(answers))
    assert not any("scripted:x" in question for question in panellist.questions)
    assert {request.sample for request in panellist.asked} == {0}


async def test_what_cannot_be_read_is_missing_and_asked_again(folder: Path) -> None:
    def unsure(request: Request) -> str | Reply:
        return "Well." if "7.5" in question_of(request) else by_quality(request)

    manifest = await judged(config(folder), Panellist(answer=unsure), Sampled(ANSWERS))
    assert rows_of(config(folder)) == [("x", "It is 3."), ("y", "It is 2.")]
    assert manifest.unscored == 2
    later = Panellist()
    assert (await judged(config(folder), later)).unscored == 0
    assert rows_of(config(folder)) == BEST
    assert all("Attempt 4:" in question for question in later.questions)


async def test_a_refusal_is_no_zero(folder: Path) -> None:
    """Nor would a negative score be worse than it."""

    def strict(request: Request) -> str | Reply:
        return refusal() if "7.5" in question_of(request) else scores(0)

    manifest = await judged(config(folder), Panellist(answer=strict), Sampled(ANSWERS))
    assert rows_of(config(folder)) == [("x", "It is 3."), ("y", "It is 2.")]
    assert manifest.unscored == 2


async def test_a_request_that_fails_is_asked_again(folder: Path) -> None:
    def fail(request: Request) -> str:
        if "7.5" in question_of(request):
            raise TeacherError("the network is down.")
        return by_quality(request)

    manifest = await judged(config(folder), Panellist(answer=fail), Sampled(ANSWERS))
    assert manifest.unscored == 2
    later = Panellist()
    assert (await judged(config(folder), later)).unscored == 0
    assert (len(later.asked), rows_of(config(folder))) == (2, BEST)


# The wall.


def paid(tokens: int) -> float:
    price = price_of(PRICED)
    assert price is not None
    return price.cost(Usage(input_tokens=tokens, output_tokens=tokens))


async def test_one_wall_holds_for_teacher_and_judge(folder: Path) -> None:
    """The teacher has spent nearly all: nothing is left for the judge, however little it has spent itself."""
    teacher = Sampled(ANSWERS, spec=PRICED, tokens=10_000)
    wall = config(folder, teacher=PRICED, judge=PRICED, max_cost=6 * paid(10_000) + 0.08)
    panellist = Panellist(spec=PRICED, tokens=1_000)
    with pytest.raises(
        TeacherError, match=r"5 of 6 answers have no verdict .*--max-cost 1\.16\. No data set"
    ) as caught:
        await judged(wall, panellist, teacher)
    assert caught.value.hint is not None and "--choose shortest" in caught.value.hint
    assert not (wall.out / "train.jsonl").exists()
    with Ledger(DataFolder(wall.out).ledger) as collected, Ledger(DataFolder(wall.out).judge_ledger) as book:
        assert collected.spending().paid == pytest.approx(6 * paid(10_000))
        assert 0 < collected.spending().most + book.spending().most <= wall.max_cost  # type: ignore[operator]
    asked = len(panellist.asked)
    higher = wall.model_copy(update={"max_cost": 3.0})
    manifest = await judged(higher, panellist, teacher)
    assert rows_of(higher) == BEST
    assert (len(panellist.asked), len(teacher.asked)) == (5, 6)
    assert 0 < asked < 5
    assert manifest.judge_usd == pytest.approx(5 * paid(1_000))
    assert manifest.cost_usd == pytest.approx(6 * paid(10_000))


async def test_what_the_judge_has_spent_counts_against_the_teacher(folder: Path) -> None:
    teacher = Sampled({**ANSWERS, "z": ["It is 1."] * 3}, spec=PRICED, tokens=1_000)
    first = config(folder, teacher=PRICED, judge=PRICED, max_cost=5.0, max_tokens=100)
    await judged(first, Panellist(spec=PRICED, tokens=50_000), teacher)
    with (folder / "p.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "z", "id": "Z"}\n')
    # Enough for the teacher alone, whose answers cost two cents each.
    tight = first.model_copy(update={"max_cost": 5 * paid(50_000)})
    manifest = await judged(tight, Panellist(answer=lambda _: pytest.fail("asked"), spec=PRICED), teacher)
    assert (len(teacher.asked), manifest.unsent) == (6, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"judge": PRICED}, "nothing bounds that"),
        ({"judge": "openai:x", "max_cost": 1.0}, "the judge openai:x has no listed price"),
        ({"judge": "nobody:x"}, "unknown teacher"),
        ({"judge": "rubric,mlx:x"}, "unknown teacher"),
        ({"judge": "recorded:x", "judge_url": "http://127.0.0.1:1/v1"}, "takes no base URL"),
    ],
)
def test_a_judge_that_cannot_be_is_told_at_once(folder: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        open_scorer(config(folder, **changes))


def test_no_judge_is_opened_where_none_is_asked(folder: Path) -> None:
    assert open_scorer(config_for(folder, "p.jsonl", 3, choose="shortest")) is None
    assert open_scorer(config(folder, judge=PRICED, dry_run=True)) is None
    assert isinstance(open_scorer(config(folder, judge="rubric")), RubricScorer)


def test_an_agreed_judge_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-ant-x")
    for agreed in ({"yes": True}, {"max_cost": 1.0}):
        scorer = open_scorer(config(folder, judge=PRICED, **agreed))
        assert scorer is not None and scorer.name == PRICED


# The rubric.


async def test_the_rubric_takes_what_runs(folder: Path) -> None:
    settings = config(folder, judge="rubric")
    teacher = Sampled({"x": [POOR, GOOD, POOR], "y": ["", "Perhaps.", GOOD]})
    manifest = await collect(settings, teacher, scorer=RubricScorer(settings))
    assert rows_of(settings) == [("x", GOOD), ("y", GOOD)]
    assert (manifest.chosen_by, manifest.unscored) == ("rubric", 0)
    assert not DataFolder(settings.out).judge_ledger.exists()


@pytest.mark.skipif(sandbox_support().problem is None, reason="there is a sandbox here")
async def test_the_rubric_runs_nothing_outside_a_sandbox_that_is_required(folder: Path) -> None:
    settings = config(folder, judge="rubric", sandbox="required")
    mark = folder / "ran"
    answers = [fenced(f"open({str(mark)!r}, 'w')"), "It is 2."]
    with pytest.raises((IsolationError, DependencyError)):
        await collect(settings, Sampled({"x": [*answers, "3"], "y": ["1", "2", "3"]}), scorer=RubricScorer(settings))
    assert not mark.exists()


def test_best_of_three_from_a_server_by_the_commands(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    (folder / "one.txt").write_text("Double a number in Python.\n", encoding="utf-8")
    arguments = [
        *("collect", "--prompts", folder / "one.txt", "--teacher", f"openai:{MODEL}", "--out", folder / "out"),
        *("--samples", "3", "--temperature", "0.8", "--choose", "best", "--valid-fraction", "0"),
        *("--test-fraction", "0", "--accept-terms", "--yes", "--duplicate-threshold", "0"),
    ]
    with ChatServer() as server:
        server.answers.extend(Answer(body=completion(text)) for text in (POOR, GOOD, POOR))
        told = CliRunner().invoke(main, [*map(str, arguments), "--base-url", server.url])
        assert told.exit_code == 0, told.output
        assert rows_of(config(folder)) == [("Double a number in Python.", GOOD)]
        assert "Left out, not chosen: 2 (prompt-" in told.stdout
        assert "Of 3 samples a prompt 3.0 could be used on average." in told.stdout
        assert "the best is a row, as rubric scores them" in told.stdout
        # Another judge chooses anew, and asks the teacher nothing.
        asked = len(server.requests)
        with ChatServer() as bench:
            bench.answers.extend(Answer(body=completion(scores(value))) for value in (4, 4, 4))
            more = ["--judge", f"openai:{MODEL}", "--judge-url", bench.url, "--base-url", server.url, "--json"]
            told = CliRunner().invoke(main, [*map(str, arguments), *more])
            assert told.exit_code == 0, told.output
            assert len(bench.requests) == 2  # Two of the three answers are the same.
        assert len(server.requests) == asked
    found = json.loads(told.stdout)
    assert (found["chosen_by"], found["unscored"], found["rows"]["train"]) == (f"openai:{MODEL}", 0, 1)
    assert found["usable_per_prompt"] == 3


def test_a_dry_run_names_a_judge_that_is_paid(folder: Path) -> None:
    arguments = ["collect", "--prompts", folder / "p.jsonl", "--teacher", PRICED, "--samples", "3", "--dry-run"]
    arguments += ["--out", folder / "out", "--choose", "best"]
    told = CliRunner().invoke(main, [*map(str, arguments), "--judge", PRICED])
    assert f"Not in this: {PRICED}, who chooses the best" in told.stdout
    assert "Not in this" not in CliRunner().invoke(main, list(map(str, arguments))).stdout
    assert not (folder / "out").exists()
