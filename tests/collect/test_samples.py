"""Several answers to a prompt: what is asked, what is found again, and what every count says of them."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from mlx_distill.budget import worst_usage
from mlx_distill.cli.main import main
from mlx_distill.collect.estimate import estimate
from mlx_distill.collect.requests import PromptRequests
from mlx_distill.collect.run import collect, collect_from_spec, estimate_from_spec, require_all_answered
from mlx_distill.config import CollectConfig
from mlx_distill.errors import ConfigError, TeacherError, TeacherUnavailableError
from mlx_distill.layout import DataFolder, read_rows
from mlx_distill.ledger import Ledger
from mlx_distill.manifest import TeacherTerms
from mlx_distill.records import ChatRow, Prompt, Reply, Request
from tests.servers.messages_server import MODEL, Fault, MessagesServer

CLAUDE = f"anthropic:{MODEL}"
TEXTS = [f"question {n}" for n in range(6)]

#: A text and which of the answers to it.
Asked = tuple[str, int]


def told(request: Request) -> Reply:
    return Reply(text=f"{request.messages[-1].content} answer {request.sample}", stop="end", model="m")


@dataclass
class NumberedTeacher:
    """Answers in process, and says in its answer which sample it is."""

    act: Callable[[Request], Reply] = told
    spec: str = "scripted:x"
    asked: list[Request] = field(default_factory=list)

    def terms(self) -> TeacherTerms:
        return TeacherTerms(teacher=self.spec, licence="MIT", summary="free")

    async def ask(self, request: Request) -> Reply:
        self.asked.append(request)
        return self.act(request)

    async def close(self) -> None:
        """Nothing is open."""

    @property
    def seen(self) -> list[Asked]:
        return [(request.messages[-1].content or "", request.sample) for request in self.asked]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{text}\n" for text in TEXTS), encoding="utf-8")
    return path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[MessagesServer]:
    monkeypatch.setattr("mlx_distill.collect.batch.POLL_SECONDS", (0.01, 0.02))
    with MessagesServer() as running:
        count = itertools.count()
        running.answer = lambda prompt: f"{prompt} answer {next(count)}"
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


def config_for(prompts: Path, **changes: object) -> CollectConfig:
    values = {
        "prompts": prompts,
        "teacher": "scripted:x",
        "out": prompts.parent / "out",
        "samples": 3,
        "concurrency": 1,
        "valid_fraction": 0,
        "test_fraction": 0,
        # Answers that differ by a number are near duplicates.
        "duplicate_threshold": 0,
        "accept_terms": True,
        **changes,
    }
    return CollectConfig.model_validate(values)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def rows(config: CollectConfig) -> list[list[str | None]]:
    return [[message.content for message in row.messages] for row in read_rows(config.out / "train.jsonl", ChatRow)]


def every(samples: int) -> list[Asked]:
    return [(text, sample) for text in TEXTS for sample in range(samples)]


# The requests.


@given(st.integers(1, 7), st.integers(1, 5), st.slices(40), st.integers(-40, 40))
def test_requests_go_prompt_by_prompt_however_they_are_looked_at(
    prompts: int, samples: int, part: slice, place: int
) -> None:
    found = PromptRequests(
        [Prompt(id=f"p{n}", family=f"f{n}", text=f"t{n}") for n in range(prompts)],
        teacher="t",
        system=None,
        max_tokens=9,
        samples=samples,
        temperature=0.5,
    )
    whole = list(found)
    assert [(request.prompt_id, request.family, request.sample) for request in whole] == [
        (f"p{n}", f"f{n}", sample) for n in range(prompts) for sample in range(samples)
    ]
    assert {request.temperature for request in whole} == {0.5}
    assert len({request.key for request in whole}) == len(whole) == len(found)
    assert found[part] == whole[part]
    if -len(whole) <= place < len(whole):
        assert found[place] == whole[place]
    else:
        with pytest.raises(IndexError):
            found[place]


# A collection.


async def test_every_sample_is_asked_once_and_is_a_row_in_order(prompts: Path) -> None:
    teacher, config = NumberedTeacher(), config_for(prompts, temperature=0.7)
    manifest = await collect(config, teacher)
    assert teacher.seen == every(3)
    assert {request.temperature for request in teacher.asked} == {0.7}
    assert rows(config) == [[text, f"{text} answer {sample}"] for text, sample in every(3)]
    assert (manifest.prompts, manifest.samples, manifest.temperature, manifest.answered) == (6, 3, 0.7, 18)
    assert (manifest.rows["train"], manifest.families["train"]) == (18, 6)
    again = NumberedTeacher()
    assert await collect(config, again) == manifest
    assert again.asked == []


async def test_more_samples_later_ask_only_the_new_ones_and_fewer_use_the_first(prompts: Path) -> None:
    one = await collect(config_for(prompts, samples=1), NumberedTeacher())
    assert (one.samples, one.answered) == (1, 6)
    more = NumberedTeacher()
    assert (await collect(config_for(prompts), more)).answered == 18
    assert more.seen == [(text, sample) for text in TEXTS for sample in (1, 2)]
    fewer, config = NumberedTeacher(), config_for(prompts, samples=2)
    assert (await collect(config, fewer)).rows["train"] == 12
    assert fewer.asked == []
    assert rows(config) == [[text, f"{text} answer {sample}"] for text, sample in every(2)]


async def test_another_temperature_is_another_answer(prompts: Path) -> None:
    for temperature in (None, 0.5, 1.0):
        teacher = NumberedTeacher()
        await collect(config_for(prompts, temperature=temperature), teacher)
        assert teacher.seen == every(3)
    teacher = NumberedTeacher()
    await collect(config_for(prompts, temperature=0.5), teacher)
    assert teacher.asked == []


async def test_a_cut_sample_is_asked_again_as_the_sample_it_is(prompts: Path) -> None:
    def act(request: Request) -> Reply:
        cut = request.sample == 1 and request.max_tokens < 40
        return told(request).model_copy(update={"stop": "length" if cut else "end"})

    teacher, config = NumberedTeacher(act), config_for(prompts, max_tokens=10, max_tokens_ceiling=40, temperature=0.7)
    manifest = await collect(config, teacher)
    assert (manifest.answered, manifest.asked_again) == (18, 12)
    limits = Counter((request.sample, request.max_tokens) for request in teacher.asked)
    assert limits == {(0, 10): 6, (1, 10): 6, (1, 20): 6, (1, 40): 6, (2, 10): 6}
    assert {request.temperature for request in teacher.asked} == {0.7}


async def test_failures_are_counted_by_answer_and_named_by_prompt(prompts: Path) -> None:
    def act(request: Request) -> Reply:
        if request.sample and (request.messages[-1].content or "") in TEXTS[:2]:
            raise TeacherError("no")
        return told(request)

    manifest = await collect(config_for(prompts), NumberedTeacher(act))
    (failed,) = manifest.dropped
    assert (failed.reason, failed.count, len(failed.prompt_ids)) == ("failed", 4, 2)
    assert (manifest.answered, manifest.asked) == (14, 18)
    with pytest.raises(TeacherError, match=r"^4 of 18 requests failed: [\w-]+, [\w-]+\.\n"):
        require_all_answered(manifest)
    again = NumberedTeacher()
    require_all_answered(await collect(config_for(prompts), again))
    assert again.seen == [(text, sample) for text in TEXTS[:2] for sample in (1, 2)]


async def test_a_teacher_that_is_gone_is_told_with_the_requests_it_answered(prompts: Path) -> None:
    def act(request: Request) -> Reply:
        if (request.messages[-1].content, request.sample) == (TEXTS[1], 1):
            raise TeacherUnavailableError("a spend limit is reached")
        return told(request)

    with pytest.raises(TeacherUnavailableError, match="4 of 18 requests have their answer"):
        await collect(config_for(prompts), NumberedTeacher(act))


async def test_nothing_to_train_on_is_told_of_all_requests(prompts: Path) -> None:
    def act(request: Request) -> Reply:
        return told(request).model_copy(update={"stop": "refusal"})

    with pytest.raises(TeacherError, match=r"of 18 requests none has an answer to train on \(18 refused\)"):
        await collect(config_for(prompts), NumberedTeacher(act))


def test_the_summary_counts_and_divides_by_all_requests(server: MessagesServer, prompts: Path) -> None:
    server.faults[TEXTS[0]].append(Fault("stop", stop_reason="refusal", text=""))
    server.faults[TEXTS[0]].append(Fault("stop", stop_reason="refusal", text=""))
    server.faults[TEXTS[1]].append(Fault("status", status=400))
    arguments = [
        *("collect", "--prompts", prompts, "--teacher", CLAUDE, "--out", prompts.parent / "out", "--accept-terms"),
        *("--valid-fraction", "0", "--test-fraction", "0", "--duplicate-threshold", "0", "--samples", "3"),
    ]
    result = run(*arguments)
    assert result.exit_code == 1
    assert f"15 of 18 requests answered by {CLAUDE}, 3 to each of 6 prompts." in result.stdout
    assert "Of all requests: whole 83.3%, failed 5.6%, refused 11.1%." in result.stdout
    assert "1 request failed. The same command asks again" in result.stdout
    (ids,) = {line for line in result.stdout.splitlines() if line.startswith("Left out, refused")}
    assert ids.startswith("Left out, refused: 2 (")
    assert "," not in ids.removeprefix("Left out, refused")
    data = json.loads(run(*arguments, "--json").stdout)
    assert (data["prompts"], data["samples"], data["answered"], data["failed"]) == (6, 3, 16, 0)
    assert server.billed == dict.fromkeys(TEXTS, 3)


# Batches.


def test_a_batch_takes_every_sample_and_is_come_back_to(server: MessagesServer, prompts: Path) -> None:
    server.looks = 2
    config = config_for(prompts, teacher=CLAUDE, batch=True, wait=False)
    left = collect_from_spec(config)
    assert (left.in_batch, left.answered, left.asked) == (18, 0, 18)
    with pytest.raises(TeacherError, match="0 of 18 requests are not sent yet, 18 are in a batch"):
        require_all_answered(left)
    (batch,) = server.batches.all
    assert len({request["custom_id"] for request in batch.requests}) == 18
    back = collect_from_spec(config.model_copy(update={"wait": True}))
    assert (back.answered, back.batch_answers, back.in_batch) == (18, 18, 0)
    more = collect_from_spec(config.model_copy(update={"wait": True, "samples": 4}))
    assert (more.answered, more.samples) == (24, 4)
    assert [len(batch.requests) for batch in server.batches.all] == [18, 6]
    assert server.billed == dict.fromkeys(TEXTS, 4)
    texts = [row[1] for row in rows(config)]
    assert len(set(texts)) == 24
    assert all((row[1] or "").startswith(f"{row[0]} answer ") for row in rows(config))


# What it costs.


def test_an_estimate_counts_all_samples(tmp_path: Path) -> None:
    def requests(samples: int) -> PromptRequests:
        asked = [Prompt(id=f"p{n}", family=f"p{n}", text=f"question {n}") for n in range(10)]
        return PromptRequests(asked, teacher=CLAUDE, system=None, max_tokens=1000, samples=samples)

    one, three = (estimate(requests(n), teacher=CLAUDE, ceiling=3000) for n in (1, 3))
    assert (one.prompts, one.samples, one.requests, one.asked) == (10, 1, 10, 10)
    assert (three.prompts, three.samples, three.requests, three.asked) == (10, 3, 30, 30)
    tokens_in = sum(worst_usage(request).input_tokens for request in requests(3))
    assert three.worst == pytest.approx((3 * tokens_in * 3 + 30 * (1000 + 2000 + 3000) * 15) / 1e6)
    assert three.expected == pytest.approx(3 * (one.expected or 0), rel=1e-3)
    assert [row.online for row in three.scale] == [pytest.approx(3 * row.online) for row in one.scale]
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.plan(requests(1))
        for request in requests(1):
            ledger.mark_sent(request.key)
            ledger.record_reply(request.key, Reply(text="x", stop="end", model="m"))
        assert estimate(requests(3), teacher=CLAUDE, ceiling=3000, ledger=ledger).requests == 20


def test_a_dry_run_shows_all_samples(server: MessagesServer, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["collect", "--prompts", prompts, "--teacher", CLAUDE, "--out", prompts.parent / "out"]
    collect_from_spec(config_for(prompts, teacher=CLAUDE, samples=1))
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    result = run(*arguments, "--dry-run", "--samples", "3")
    assert result.exit_code == 0, result.stderr
    assert f"12 requests to {CLAUDE}; 6 of 18 requests have their answer, or are in a batch." in result.stdout
    assert "prompts, 3 answers each" in result.stdout
    data = json.loads(run(*arguments, "--dry-run", "--samples", "3", "--json").stdout)
    assert (data["prompts"], data["samples"], data["requests"]) == (6, 3, 12)
    assert len(server.requests) == 6


def test_consent_is_asked_for_all_samples(server: MessagesServer, tmp_path: Path) -> None:
    path = tmp_path / "many.txt"
    path.write_text("".join(f"question {n}\n" for n in range(100)), encoding="utf-8")
    config = config_for(path, teacher=CLAUDE)
    assert (estimate_from_spec(config.model_copy(update={"samples": 1})).expected or 0) < 5
    with pytest.raises(ConfigError, match=r"300 requests are expected to cost \$6\.\d+.*nothing was sent"):
        collect_from_spec(config)
    assert server.requests == []


# A model on this machine.


@pytest.fixture(scope="module")
def ending_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with so many end marks that its answers are short."""
    folder = tmp_path_factory.mktemp("ending") / "model"
    shutil.copytree(tiny_model, folder)
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["eos_token_id"] = [settings["eos_token_id"], *range(0, 380, 8)]
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def answers_of(config: CollectConfig) -> dict[Asked, tuple[str, str]]:
    """Text and stop of what counts, by prompt and sample."""
    with Ledger(DataFolder(config.out).ledger) as ledger:
        return {
            (entry.request.messages[0].content or "", entry.request.sample): (entry.reply.text, entry.reply.stop)
            for entry in ledger.entries()
            if entry.reply is not None
        }


def test_a_local_model_draws_the_same_again_in_whatever_order_it_is_asked(
    ending_model: Path, prompts: Path, tmp_path: Path
) -> None:
    def config(name: str, **changes: object) -> CollectConfig:
        given = {"teacher": f"mlx:{ending_model}", "out": tmp_path / name, "temperature": 1.0, "max_tokens": 48}
        return config_for(prompts, **{**given, "max_tokens_ceiling": 48, "samples": 4, "concurrency": 24, **changes})

    collect_from_spec(config("whole"))
    whole = answers_of(config("whole"))
    assert whole.keys() == set(every(4))
    # Some of so small a model's answers are empty, and so alike; all four to every prompt are not.
    assert len({(text, whole[text, sample]) for text in TEXTS for sample in range(4)}) > len(TEXTS)
    # Left after two samples, gone on with alone.
    collect_from_spec(config("parts", samples=2, concurrency=3))
    collect_from_spec(config("parts", concurrency=1))
    assert answers_of(config("parts")) == whole
    assert (tmp_path / "parts" / "train.jsonl").read_bytes() == (tmp_path / "whole" / "train.jsonl").read_bytes()
    # A lower limit first: what is cut is drawn again as it was, and goes on.
    collect_from_spec(config("cut", max_tokens=3))
    assert answers_of(config("cut")) == whole
