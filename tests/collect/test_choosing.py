"""Which of several answers to one prompt become rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distill.collect.choosing import NOT_CHOSEN, Candidate, not_chosen
from mlx_distill.collect.run import collect, collect_from_spec
from mlx_distill.config import Choose, CollectConfig
from mlx_distill.errors import ConfigError, TeacherError
from mlx_distill.ledger import Entry, Spending
from mlx_distill.progress import Progress
from mlx_distill.settings import parse_settings
from tests.collect.sampled import Sampled, config_for, dropped, rows_of

ONE_OF = [how for how in get_args(Choose) if how != "all"]


@st.composite
def candidates(draw: st.DrawFn) -> list[Candidate]:
    places = draw(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 6)), unique=True, max_size=14))
    return [
        Candidate(
            f"{prompt}/{sample}",
            prompt,
            sample,
            draw(st.integers(0, 3)),
            draw(st.none() | st.sampled_from([-1.0, 0.0, 2.5, 10.0])),
        )
        for prompt, sample in places
    ]


def left(found: Sequence[Candidate], how: Choose) -> dict[str, Candidate]:
    reasons = not_chosen(found, how)
    assert set(reasons.values()) <= {NOT_CHOSEN}
    assert reasons.keys() <= {one.key for one in found}
    return {one.key: one for one in found if one.key not in reasons}


def by_hand(group: Sequence[Candidate], how: Choose) -> Candidate:
    """Said another way: walk the samples in order, and take one over only for what is strictly better."""
    if how == "best":
        group = [one for one in group if one.score is not None] or group
    best, *others = sorted(group, key=lambda one: one.sample)
    for one in others:
        shorter = how == "shortest" and one.characters < best.characters
        better = how == "best" and one.score is not None and best.score is not None and one.score > best.score
        if shorter or better:
            best = one
    return best


@given(candidates())
def test_all_leaves_none_out(found: list[Candidate]) -> None:
    assert not_chosen(found, "all") == {}


@pytest.mark.parametrize("how", ONE_OF)
@given(found=candidates())
def test_one_a_prompt_is_left_and_it_is_the_right_one(how: Choose, found: list[Candidate]) -> None:
    groups = {prompt: [one for one in found if one.prompt_id == prompt] for prompt in {one.prompt_id for one in found}}
    assert sorted(left(found, how)) == sorted(by_hand(group, how).key for group in groups.values())


@pytest.mark.parametrize("how", ONE_OF)
@given(found=candidates(), seed=st.integers(0, 9))
def test_the_order_says_nothing(how: Choose, found: list[Candidate], seed: int) -> None:
    mixed = random.Random(seed).sample(found, len(found))
    assert left(mixed, how).keys() == left(found, how).keys()


@pytest.mark.parametrize("how", ONE_OF)
@given(found=candidates())
def test_what_other_prompts_have_says_nothing(how: Choose, found: list[Candidate]) -> None:
    alone = [one for one in found if one.prompt_id == "a"]
    assert left(alone, how).keys() == {key for key, one in left(found, how).items() if one.prompt_id == "a"}


@given(candidates())
def test_no_verdict_is_never_better_than_one(found: list[Candidate]) -> None:
    for one in left(found, "best").values():
        if one.score is None:
            assert all(other.score is None for other in found if other.prompt_id == one.prompt_id)


# In a collection.


@dataclass
class FakeScorer:
    """Scores a text by a function; remembers what it was asked."""

    rate: Callable[[str], float | None]
    name: str = "fake"
    asked: list[str] = field(default_factory=list)
    closed: bool = False

    async def score(
        self, answers: Mapping[str, Entry], spent: Spending, progress: Progress
    ) -> Mapping[str, float | None]:
        texts = {key: entry.reply.text for key, entry in answers.items() if entry.reply is not None}
        self.asked += texts.values()
        return {key: self.rate(text) for key, text in texts.items()}

    async def close(self) -> None:
        self.closed = True


ANSWERS = {"x": ["xlong 1", "x 2", "x 3"], "y": ["y 9", "y 8", "yyyy"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "id": "X"}\n{"prompt": "y", "id": "Y"}\n', encoding="utf-8")
    return tmp_path


def by_number(text: str) -> float | None:
    return float(text[-1]) if text[-1].isdigit() else None


@pytest.mark.parametrize(
    ("how", "rows"),
    [
        ("all", [("x", text) for text in ANSWERS["x"]] + [("y", text) for text in ANSWERS["y"]]),
        ("first", [("x", "xlong 1"), ("y", "y 9")]),
        ("shortest", [("x", "x 2"), ("y", "y 9")]),
        ("best", [("x", "x 3"), ("y", "y 9")]),
    ],
)
async def test_rows_are_what_is_chosen(folder: Path, how: Choose, rows: list[tuple[str, str]]) -> None:
    config = config_for(folder, "p.jsonl", 3, choose=how)
    scorer = FakeScorer(by_number)
    manifest = await collect(config, Sampled(ANSWERS), scorer=scorer)
    assert rows_of(config) == rows
    assert dropped(manifest) == ({} if how == "all" else {NOT_CHOSEN: (4, ("X", "Y"))})
    assert manifest.chosen_by == {"all": None, "best": "fake"}.get(how, how)
    assert (manifest.answered, manifest.unscored) == (6, 1 if how == "best" else 0)
    assert scorer.asked == ([*ANSWERS["x"], *ANSWERS["y"]] if how == "best" else [])
    again = Sampled(ANSWERS)
    assert await collect(config, again, scorer=FakeScorer(by_number)) == manifest
    assert again.asked == []


async def test_one_choice_after_another_needs_no_teacher(folder: Path) -> None:
    await collect(config_for(folder, "p.jsonl", 3), Sampled(ANSWERS))
    silent = Sampled({})
    config = config_for(folder, "p.jsonl", 3, choose="shortest")
    assert (await collect(config, silent)).rows["train"] == 2
    assert (await collect(config_for(folder, "p.jsonl", 3), silent)).rows["train"] == 6


async def test_only_where_there_is_something_to_choose_anyone_is_asked(folder: Path) -> None:
    secret = "Use `AKIAQ3EGRZTX7WNB5KLM` as the key id. 9"
    answers = {"x": ["x 1", secret, secret], "y": ["y 1", "y 2", secret]}
    scorer = FakeScorer(by_number)
    config = config_for(folder, "p.jsonl", 3, choose="best")
    manifest = await collect(config, Sampled(answers), scorer=scorer)
    # What is left out for a reason of its own is not scored, and not chosen however good it were.
    assert scorer.asked == ["y 1", "y 2"]
    assert rows_of(config) == [("x", "x 1"), ("y", "y 2")]
    assert dropped(manifest) == {"credentials": (3, ("X", "Y")), NOT_CHOSEN: (1, ("Y",))}


async def test_without_any_verdict_of_a_prompt_the_first_is_taken(folder: Path) -> None:
    config = config_for(folder, "p.jsonl", 3, choose="best")
    scorer = FakeScorer(lambda text: None if text.startswith("y") else by_number(text))
    manifest = await collect(config, Sampled(ANSWERS), scorer=scorer)
    assert rows_of(config) == [("x", "x 3"), ("y", "y 9")]
    assert manifest.unscored == 3


async def test_a_judge_that_says_nothing_at_all_chooses_nothing(folder: Path) -> None:
    config = config_for(folder, "p.jsonl", 3, choose="best")
    with pytest.raises(TeacherError, match="fake gave no verdict that can be read on any of 6 answers"):
        await collect(config, Sampled(ANSWERS), scorer=FakeScorer(lambda _: None))
    assert not (config.out / "train.jsonl").exists()
    silent = Sampled({})
    assert (await collect(config, silent, scorer=FakeScorer(by_number))).rows["train"] == 2


async def test_duplicates_are_found_among_the_chosen(folder: Path) -> None:
    """Else a worse answer would take a better one's place."""
    walk = "Keep one index a list and compare the two numbers that they point at. Append the smaller one, and go on "
    answers = {"x": [walk * 3 + "1", walk * 3 + "3", "x 2"], "y": ["y 1", "y 1", "y 1"]}
    best = config_for(folder, "p.jsonl", 3, choose="best", duplicate_threshold=0.9)
    manifest = await collect(best, Sampled(answers), scorer=FakeScorer(by_number))
    assert rows_of(best) == [("x", walk * 3 + "3"), ("y", "y 1")]
    assert "duplicate" not in dropped(manifest)
    every = await collect(config_for(folder, "p.jsonl", 3, duplicate_threshold=0.9), Sampled({}))
    assert dropped(every) == {"duplicate": (3, ("X", "Y"))}


async def test_no_judge_is_no_choice(folder: Path) -> None:
    teacher = Sampled(ANSWERS)
    with pytest.raises(ConfigError, match="no judge was opened"):
        await collect(config_for(folder, "p.jsonl", 3, choose="best"), teacher)
    assert teacher.asked == []


def test_a_scorer_is_closed_whatever_happens(folder: Path) -> None:
    scorer = FakeScorer(by_number)
    config = config_for(folder, "p.jsonl", 1, teacher="nonsense:x", choose="best")
    with pytest.raises(ConfigError):
        collect_from_spec(config, scorer=scorer)
    assert scorer.closed


def test_a_judge_with_nothing_to_choose_is_a_mistake() -> None:
    values = {"prompts": "p.txt", "teacher": "mlx:x"}
    for more in ({"judge": "mlx:y"}, {"judge": "mlx:y", "choose": "shortest"}, {"judge_url": "http://127.0.0.1/v1"}):
        with pytest.raises(ConfigError, match="give choose = best with judge"):
            parse_settings(CollectConfig, {**values, **more}, where="here")
    assert parse_settings(CollectConfig, {**values, "judge": "mlx:y", "choose": "best"}, where="here").judge == "mlx:y"
