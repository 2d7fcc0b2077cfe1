"""The wall of `--max-cost`, the estimate before it, and who is asked."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distill.asking import ask_all
from mlx_distill.budget import Budget, worst_usage
from mlx_distill.cli.main import main
from mlx_distill.collect.estimate import estimate
from mlx_distill.collect.requests import PromptRequests, longer
from mlx_distill.collect.run import collect, collect_from_spec
from mlx_distill.config import CollectConfig
from mlx_distill.errors import ConfigError, TeacherError
from mlx_distill.ledger import Ledger
from mlx_distill.manifest import TeacherTerms
from mlx_distill.pricing import Price, price_of
from mlx_distill.records import Prompt, Reply, Request, StopReason, Usage
from mlx_distill.teachers.sending import current

MODEL = "claude-sonnet-4-6"
PRICE = Price(3, 15)
CENT = 0.01


@dataclass
class PaidTeacher:
    """Bills what the test says for each sending, also for those that are cut off; as a provider would."""

    seed: int
    cuts: float = 0.0
    failures: float = 0.0
    spec: str = f"anthropic:{MODEL}"
    billed: float = 0.0
    asked: list[Request] = field(default_factory=list)

    def terms(self) -> TeacherTerms:
        return TeacherTerms(teacher=self.spec, licence="x", summary="x")

    async def ask(self, request: Request) -> Reply:
        chance = random.Random(f"{self.seed} {request.key} {len(self.asked)}")
        self.asked.append(request)
        for _ in range(3):
            await asyncio.sleep(0)
            tokens = chance.randint(1, request.max_tokens)
            usage = Usage(input_tokens=worst_usage(request).input_tokens - 64, output_tokens=tokens)
            if chance.random() < self.failures:
                raise TeacherError("no")
            self.billed += PRICE.cost(usage)
            if chance.random() < self.cuts:
                current().cut += 1
                if not await current().note_cut():
                    raise TeacherError("cut, and no money to send it again")
                current().noted += 1
                continue
            stop: StopReason = "length" if tokens == request.max_tokens else "end"
            return Reply(text="x", stop=stop, model="m", usage=usage)
        raise TeacherError("cut three times")

    async def close(self) -> None:
        """Nothing is open."""


def requests_for(prompts: int, max_tokens: int = 500) -> PromptRequests:
    asked = [Prompt(id=f"p{n}", family=f"p{n}", text=f"question {n} " + "é" * (n % 7)) for n in range(prompts)]
    return PromptRequests(asked, teacher=f"anthropic:{MODEL}", system=None, max_tokens=max_tokens)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    limit=st.floats(0, 0.3),
    concurrency=st.integers(1, 12),
    cuts=st.sampled_from([0.0, 0.2, 0.7]),
    failures=st.sampled_from([0.0, 0.3]),
    runs=st.integers(1, 3),
)
def test_whatever_happens_the_provider_bills_no_more_than_the_limit(
    seed: int, limit: float, concurrency: int, cuts: float, failures: float, runs: int
) -> None:
    teacher = PaidTeacher(seed, cuts, failures)
    requests = list(requests_for(20))

    async def ask(ledger: Ledger) -> int:
        budget = Budget(PRICE, limit, ledger.spending())
        asked = await ask_all(
            requests,
            teacher,
            ledger,
            concurrency=concurrency,
            budget=budget,
            follow_up=lambda request, reply: longer(request, reply.stop, 2000),
        )
        return asked.left

    with Ledger(Path(":memory:")) as ledger:
        for _ in range(runs):
            left = asyncio.run(ask(ledger))
            assert teacher.billed <= limit + 1e-9
            # And what the ledger takes for spent is never less than what is billed.
            assert ledger.spending().most >= teacher.billed - 1e-9
        if not left and not cuts and not failures:
            assert ledger.counts([r.key for r in requests])["planned"] == 0


def test_the_limit_is_used_as_far_as_it_goes() -> None:
    # Each is at most 0.75 cents and costs a part of that: far more fit than worst cases would.
    teacher = PaidTeacher(1)
    with Ledger(Path(":memory:")) as ledger:
        budget = Budget(PRICE, 5 * CENT, ledger.spending())
        asked = asyncio.run(ask_all(list(requests_for(30)), teacher, ledger, concurrency=4, budget=budget))
        assert asked.left
        assert asked.left == ledger.counts()["planned"]
    assert teacher.billed > 4 * CENT
    assert 30 - asked.left > 6


def test_an_estimate_knows_the_worst_and_says_what_it_rests_on(tmp_path: Path) -> None:
    requests = requests_for(10, max_tokens=1000)
    found = estimate(requests, teacher=requests[0].teacher, ceiling=3000)
    assert (found.requests, found.source) == (10, "characters")
    tokens_in = sum(worst_usage(request).input_tokens for request in requests)
    assert found.worst == pytest.approx((3 * tokens_in * 3 + 10 * (1000 + 2000 + 3000) * 15) / 1e6)
    assert found.worst_batch == pytest.approx((found.worst or 0) / 2)
    assert [row.prompts for row in found.scale] == [104, 10_000, 1_000_000, 16_000_000]
    assert found.scale[2].batch == pytest.approx(found.scale[2].online / 2)
    with Ledger(tmp_path / "ledger.db") as ledger:
        ledger.plan(requests)
        for request in requests[:4]:
            ledger.mark_sent(request.key, worst_usd=1.0)
        for request in requests[:3]:
            usage = Usage(input_tokens=20, output_tokens=300)
            ledger.record_reply(request.key, Reply(text="x", stop="end", model="m", usage=usage), cost_usd=0.25)
        measured = estimate(requests, teacher=requests[0].teacher, ceiling=3000, ledger=ledger)
    assert (measured.source, measured.replies, measured.requests) == ("measured", 3, 7)
    assert measured.output_tokens == 7 * 300
    assert measured.spent == pytest.approx(3 * 0.25 + 1.0)
    assert measured.scale[0].online == pytest.approx(104 * (300 * 15 + 20 * 3) / 1e6, rel=0.1)


def run(*arguments: str | Path, **options: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **options)  # type: ignore[arg-type]


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)


@pytest.mark.usefixtures("no_key")
def test_a_dry_run_needs_no_key_and_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("collect", "--prompts", "data/prompts/coding.toml", "--teacher", f"anthropic:{MODEL}", "--dry-run")
    told = run(*arguments)
    assert told.exit_code == 0
    assert "104 requests to anthropic:claude-sonnet-4-6" in told.stdout
    assert "reckoned from characters" in told.stdout
    assert [line.split()[0] for line in told.stdout.splitlines() if line.startswith("  1")] == [
        "104", "10,000", "1,000,000", "16,000,000",
    ]  # fmt: skip
    data = json.loads(run(*arguments, "--json").stdout)
    assert data["expected_batch"] == pytest.approx(data["expected"] / 2)
    assert data["worst"] > data["expected"]
    assert list(tmp_path.iterdir()) == []


def many(tmp_path: Path) -> Path:
    """Prompts whose answers are expected to cost more than $5."""
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"question {n}\n" for n in range(400)), encoding="utf-8")
    return path


def test_a_dear_collection_is_not_begun_without_a_word(tmp_path: Path) -> None:
    config = CollectConfig(prompts=many(tmp_path), teacher=f"anthropic:{MODEL}", out=tmp_path / "out")
    teacher = PaidTeacher(1)
    asked: list[str] = []

    def confirm(question: str) -> bool:
        asked.append(question)
        return len(asked) > 1

    for answer in (None, confirm):
        with pytest.raises(ConfigError, match=r"400 requests.*nothing was sent[^\n]*\n.*--max-cost USD.*--yes"):
            asyncio.run(collect(config, teacher, confirm=answer))
    assert teacher.asked == []
    assert "400 requests are expected to cost $9.0" in asked[0]
    few = config.model_copy(update={"max_cost": 0.0})
    assert asyncio.run(collect(few, teacher)).unsent == 400
    assert teacher.asked == []
    asyncio.run(collect(config, teacher, confirm=confirm))
    assert len(teacher.asked) >= 400


def test_yes_and_a_cheap_collection_need_no_word(tmp_path: Path) -> None:
    config = CollectConfig(prompts=many(tmp_path), teacher=f"anthropic:{MODEL}", out=tmp_path / "out", yes=True)
    assert asyncio.run(collect(config, PaidTeacher(1))).answered == 400
    path = tmp_path / "few.txt"
    path.write_text("one\n", encoding="utf-8")
    few = CollectConfig(
        prompts=path, teacher=f"anthropic:{MODEL}", out=tmp_path / "few", valid_fraction=0, test_fraction=0
    )
    assert asyncio.run(collect(few, PaidTeacher(1))).answered == 1


def test_without_a_terminal_the_command_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-test")
    told = run("collect", "--prompts", many(tmp_path), "--teacher", f"anthropic:{MODEL}", "--out", tmp_path / "out",
               "--accept-terms")  # fmt: skip
    assert told.exit_code == 1
    assert "expected to cost $9.0" in told.stderr
    assert "--max-cost USD" in told.stderr


def test_a_limit_without_a_price_is_refused(tmp_path: Path) -> None:
    teacher = PaidTeacher(1, spec="anthropic:claude-unheard-of")
    config = CollectConfig(prompts=many(tmp_path), teacher=teacher.spec, out=tmp_path / "out", max_cost=1.0)
    assert price_of(teacher.spec) is None
    with pytest.raises(ConfigError, match="no listed price"):
        asyncio.run(collect(config, teacher))
    assert teacher.asked == []


def test_a_free_teacher_fits_into_any_limit(tmp_path: Path) -> None:
    config = CollectConfig(
        prompts=Path("data/prompts/coding.toml"), teacher="recorded:data/starter", out=tmp_path / "o", max_cost=0.0
    )
    assert collect_from_spec(config).answered == 104


def test_reaching_the_wall_ends_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    from tests.servers.messages_server import MessagesServer

    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"question {n}\n" for n in range(10)), encoding="utf-8")
    with MessagesServer() as server, pytest.MonkeyPatch.context() as patch:
        server.answer = lambda prompt: "word " * 900
        for name, value in server.environment.items():
            patch.setenv(name, value)
        arguments = [
            *("collect", "--prompts", path, "--teacher", f"anthropic:{MODEL}", "--out", tmp_path / "out"),
            *("--accept-terms", "--valid-fraction", "0", "--test-fraction", "0", "--max-tokens", "1000"),
            *("--max-tokens-ceiling", "1000"),
        ]
        told = run(*arguments, "--max-cost", "0.05")
        assert told.exit_code == 0, told.stderr
        assert "7 are left: the worst case of one more could pass --max-cost 0.05" in told.stdout
        assert "3 of 10 prompts answered" in told.stdout
        data = json.loads(run(*arguments, "--max-cost", "0.05", "--json").stdout)
        assert (data["unsent"], data["failed"], data["rows"]["train"]) == (7, 0, 3)
        assert json.loads(run(*arguments, "--max-cost", "1", "--json").stdout)["answered"] == 10
        assert set(server.billed.values()) == {1}


def test_a_folder_follows_from_the_prompts() -> None:
    assert CollectConfig(prompts=Path("x/my-prompts.txt"), teacher="recorded:x").out == Path("data/my-prompts")
