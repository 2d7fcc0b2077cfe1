"""Sequences of faults and `kill -9` of a real process: whatever they are, nothing is lost or paid for twice."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.faults.scenario import (
    ENDPOINTS,
    EVENTS,
    FAULTS,
    Kill,
    Run,
    Story,
    Tally,
    Zygote,
    place_of,
    play,
    random_story,
)

#: Kills that a run of the tests makes at the least; `scripts/fault_suite` makes 200, and more if told to.
KILLS = 60

TALLY = Tally()

kills = st.one_of(
    st.builds(Kill, event=st.sampled_from(EVENTS), nth=st.integers(1, 6)),
    st.builds(Kill, seconds=st.floats(0, 0.25)),
)
strikes = st.builds(
    lambda name, prompt, endpoint, at_endpoint: (name, place_of(name, prompt, endpoint, at_endpoint)),
    st.sampled_from(list(FAULTS)),
    st.integers(0, 1),
    st.sampled_from(ENDPOINTS),
    st.booleans(),
)
stories = st.builds(
    Story,
    words=st.lists(st.sampled_from((1, 3, 5, 9, 20)), min_size=2, max_size=8).map(tuple),
    max_tokens=st.sampled_from((6, 9000)),
    concurrency=st.sampled_from((1, 2, 4, 8)),
    delay=st.sampled_from((0.0, 0.01, 0.03)),
    looks=st.sampled_from((0, 1, 3)),
    faults=st.lists(strikes, max_size=6).map(tuple),
    runs=st.lists(st.builds(Run, batch=st.booleans(), kill=kills), min_size=1, max_size=5).map(tuple),
    last_in_batch=st.booleans(),
)


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as running:
        yield running


@pytest.mark.parametrize("examples", [8, pytest.param(40, marks=pytest.mark.slow)])
def test_any_sequence_ends_well(zygote: Zygote, examples: int) -> None:
    @settings(
        deadline=None,
        max_examples=examples,
        # A story takes seconds: a failing one is shown as it was found.
        phases=(Phase.explicit, Phase.reuse, Phase.generate),
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(story=stories)
    def ends_well(story: Story) -> None:
        TALLY.add(play(story, zygote))

    ends_well()


def test_kills_at_random_moments(zygote: Zygote) -> None:
    chance = random.Random()
    while TALLY.kills < KILLS:
        seed = chance.randrange(10**9)
        try:
            TALLY.add(play(random_story(random.Random(seed)), zygote))
        except AssertionError as error:
            raise AssertionError(f"story {seed}: {error}") from error
    assert sum(TALLY.lost.values()) == sum(TALLY.paid_twice.values()) == 0


@pytest.mark.parametrize("name", sorted(FAULTS))
@pytest.mark.parametrize("batch", [False, True], ids=["online", "batch"])
def test_each_fault_alone(zygote: Zygote, name: str, batch: bool) -> None:
    place = place_of(name, 1, "batches create", batch)
    story = Story(
        words=(3, 9, 5),
        max_tokens=9000 if "stream" in name else 6,
        concurrency=2,
        delay=0.0,
        looks=1,
        faults=((name, place),),
        runs=(Run(batch, None),),
        last_in_batch=batch,
    )
    tally = play(story, zygote)
    # What is of batches alone does not strike online, and streams are not of batches.
    kind = FAULTS[name][1]
    strikes_here = (batch and "stream" not in name) or (not batch and kind in ("both", "request"))
    if name not in ("request expires", "request canceled", "request errored") and strikes_here:
        assert tally.tried[name] == 1


def test_the_suite_would_notice_a_double_bill(zygote: Zygote, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.servers.messages_server import MessagesServer

    accept = MessagesServer.accept

    def twice(self: MessagesServer, prompt: str) -> None:
        accept(self, prompt)
        accept(self, prompt)

    monkeypatch.setattr(MessagesServer, "accept", twice)
    story = random_story(random.Random(1), kills=0)
    with pytest.raises(AssertionError, match="billed"):
        play(story, zygote)
