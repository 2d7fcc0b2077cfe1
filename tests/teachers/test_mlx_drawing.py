"""Drawn answers of the local MLX teacher: each is that of its request, whatever is asked beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from mlx_distill.records import Message, Reply, Request
from mlx_distill.teachers.mlx import MlxTeacher

TEXTS = ("add", "for item in items", "x " * 90, "print the largest number of a list " * 5, "y")


@pytest.fixture
async def teacher(tiny_model: Path) -> AsyncIterator[MlxTeacher]:
    opened = MlxTeacher(str(tiny_model))
    yield opened
    await opened.close()


def ask_for(text: str, max_tokens: int = 24, *, sample: int = 0, temperature: float | None = None) -> Request:
    return Request(
        prompt_id="p",
        family="p",
        teacher="t",
        messages=(Message(role="user", content=text),),
        max_tokens=max_tokens,
        sample=sample,
        temperature=temperature,
    )


async def ask_at_once(teacher: MlxTeacher, requests: Sequence[Request]) -> list[Reply]:
    return await asyncio.gather(*(teacher.ask(request) for request in requests))


def said(replies: Sequence[Reply]) -> list[tuple[str, str, int]]:
    return [(reply.text, reply.stop, reply.usage.output_tokens) for reply in replies]


async def test_a_drawn_answer_is_that_of_its_request_whatever_is_beside_it(
    tiny_model: Path, teacher: MlxTeacher
) -> None:
    drawn = [ask_for(text, 10 + at, sample=n, temperature=1.0) for at, text in enumerate(TEXTS) for n in range(3)]
    greedy = [ask_for(text, 20) for text in TEXTS]
    requests = [*drawn, *greedy]
    alone = said([await teacher.ask(request) for request in requests])
    assert len({text for text, *_ in alone}) == len(alone)
    assert said(await ask_at_once(teacher, requests)) == alone
    # In another order, with fewer at once, by another teacher.
    for batch_size in (1, 2, 5):
        other = MlxTeacher(str(tiny_model), batch_size=batch_size)
        assert said(await ask_at_once(other, requests[::-1])) == alone[::-1]
        await other.close()


async def test_greedy_answers_are_as_they_were_beside_drawn_ones(teacher: MlxTeacher) -> None:
    greedy = [ask_for(text, 20) for text in TEXTS]
    expected = said(await ask_at_once(teacher, greedy))
    drawn = [ask_for(text, 20, sample=n, temperature=1.5) for text in TEXTS for n in range(2)]
    assert said(await ask_at_once(teacher, [*drawn, *greedy]))[-len(greedy) :] == expected


async def test_a_drawn_answer_is_what_mlx_lm_writes_alone_with_the_same_sampler(
    tiny_model: Path, teacher: MlxTeacher
) -> None:
    """mlx-lm's plain generation of one answer: an opinion other than the batch's."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    from mlx_distill.backends.mlx.drawing import Sampling
    from mlx_distill.backends.mlx.generation import ChatModel

    model = ChatModel(tiny_model)
    for sample in range(3):
        request = ask_for("add", 30, sample=sample, temperature=0.8)
        sampling = Sampling.of(0.8, request.draw_key)
        assert sampling is not None
        prompt = mx.array(model.encode(request.messages))
        steps = generate_step(prompt, model.module, max_tokens=30, sampler=sampling.sampler())
        assert (await teacher.ask(request)).text == model.decode([int(token) for token, _ in steps])


async def test_more_tokens_let_a_drawn_answer_go_on_as_it_began(teacher: MlxTeacher) -> None:
    cut = [await teacher.ask(ask_for("add", 8, sample=n, temperature=1.0)) for n in range(4)]
    longer = await ask_at_once(teacher, [ask_for("add", 32, sample=n, temperature=1.0) for n in range(4)])
    for short, whole in zip(cut, longer, strict=True):
        assert short.stop == "length"
        # Half of a character at the cut is a replacement sign.
        assert whole.text.startswith(short.text.rstrip("\ufffd"))
        assert len(whole.text) > len(short.text)


async def test_a_temperature_of_0_is_greedy_and_a_low_one_is_nearly(teacher: MlxTeacher) -> None:
    greedy = said([await teacher.ask(ask_for("add"))])
    assert said([await teacher.ask(ask_for("add", temperature=0.0))]) == greedy
    assert said([await teacher.ask(ask_for("add", temperature=1e-4))]) == greedy
    assert said([await teacher.ask(ask_for("add", temperature=1.5))]) != greedy
