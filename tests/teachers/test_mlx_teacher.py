"""The local MLX teacher: its answers in a batch are those alone, and nobody's fault is another's."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from mlx_distill.errors import ConfigError, ModelError, TeacherError, TeacherUnavailableError
from mlx_distill.pricing import FREE, price_of
from mlx_distill.records import Message, Reply, Request
from mlx_distill.teachers.base import Revisioned, request_name
from mlx_distill.teachers.mlx import MlxTeacher
from mlx_distill.teachers.registry import open_teacher
from tests.tiny import CHAT_TEMPLATE, make_tiny_model

CONTEXT = 2048
TEXTS = ("add", "for item in items", "x " * 90, "print the largest number of a list " * 5, "y")


@pytest.fixture
async def teacher(tiny_model: Path) -> AsyncIterator[MlxTeacher]:
    opened = MlxTeacher(str(tiny_model))
    yield opened
    await opened.close()


def ask_for(text: str, max_tokens: int = 24, *, system: str | None = None) -> Request:
    messages = (Message(role="user", content=text),)
    return Request(prompt_id="p", family="p", teacher="t", messages=messages, system=system, max_tokens=max_tokens)


async def ask_at_once(teacher: MlxTeacher, requests: Sequence[Request]) -> list[Reply | BaseException]:
    return await asyncio.gather(*(teacher.ask(request) for request in requests), return_exceptions=True)


def said(replies: Sequence[Reply | BaseException]) -> list[tuple[str, str, int, int]]:
    for reply in replies:
        assert isinstance(reply, Reply), reply
    return [
        (reply.text, reply.stop, reply.usage.input_tokens, reply.usage.output_tokens)
        for reply in replies
        if isinstance(reply, Reply)
    ]


async def test_answers_in_a_batch_are_those_alone(teacher: MlxTeacher) -> None:
    requests = [ask_for(text, 10 + 3 * at) for at, text in enumerate(TEXTS)]
    alone = [await teacher.ask(request) for request in requests]
    assert said(await ask_at_once(teacher, requests)) == said(alone)
    assert len({reply.text for reply in alone}) == len(alone)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 9])
async def test_more_than_fit_are_all_answered_as_alone(tiny_model: Path, teacher: MlxTeacher, batch_size: int) -> None:
    requests = [ask_for(f"{text}{at}", 3 + at % 7) for at, text in enumerate(TEXTS * 4)]
    expected = said(await ask_at_once(teacher, requests))
    narrow = MlxTeacher(str(tiny_model), batch_size=batch_size)
    assert said(await ask_at_once(narrow, requests)) == expected
    await narrow.close()


async def test_a_request_joins_those_under_way_and_leaves_before_them(teacher: MlxTeacher) -> None:
    await teacher.ask(ask_for("warm", 1))
    alone = said([await teacher.ask(ask_for("late", 3))])
    long = asyncio.create_task(teacher.ask(ask_for("long", 1500)))
    await asyncio.sleep(0.2)
    assert not long.done()
    assert said([await teacher.ask(ask_for("late", 3))]) == alone
    assert not long.done()
    assert (await long).usage.output_tokens > 3


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 40])
async def test_the_token_limit_is_exact_and_each_request_has_its_own(teacher: MlxTeacher, max_tokens: int) -> None:
    cut, other = said(await ask_at_once(teacher, [ask_for("add", max_tokens), ask_for("add", 3)]))
    assert cut[1:] == ("length", cut[2], max_tokens)
    assert other[3] == 3


async def test_tokens_are_counted_as_the_tokenizer_counts_them(tiny_model: Path, teacher: MlxTeacher) -> None:
    from mlx_distill.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_model)
    reply = await teacher.ask(ask_for("def add(first, second):", 20, system="Be short."))
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "def add(first, second):"}]
    assert reply.usage.input_tokens == len(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"])
    assert reply.usage.output_tokens == 20


async def test_a_model_that_ends_by_itself_has_ended(tiny_model: Path, tmp_path: Path) -> None:
    # Whatever it says fifth is made its end mark.
    teacher = MlxTeacher(str(tiny_model))
    whole = await teacher.ask(ask_for("add", 12))
    await teacher.close()
    written = _tokens_written(tiny_model, "add", 12)
    at = next(at for at, token in enumerate(written) if at >= 4 and token not in written[:at])
    ending = _copy(tiny_model, tmp_path, eos_token_id=written[at])
    teacher = MlxTeacher(str(ending))
    for budget in (at + 1, 100):  # Also as the last token that the budget allows.
        reply = await teacher.ask(ask_for("add", budget))
        assert (reply.stop, reply.usage.output_tokens) == ("end", at)
        assert whole.text.startswith(reply.text)
    assert (await teacher.ask(ask_for("add", at))).stop == "length"
    await teacher.close()


async def test_an_answer_that_the_context_cuts_says_so(tiny_model: Path, tmp_path: Path) -> None:
    small = _copy(tiny_model, tmp_path, max_position_embeddings=128)
    teacher = MlxTeacher(str(small))
    reply = await teacher.ask(ask_for("add", 4096))
    assert reply.stop == "context"
    assert reply.usage.input_tokens + reply.usage.output_tokens == 128
    exact = await teacher.ask(ask_for("add", reply.usage.output_tokens))
    assert (exact.text, exact.stop) == (reply.text, "length")
    await teacher.close()


async def test_one_that_cannot_be_asked_does_not_harm_the_others(tiny_model: Path, tmp_path: Path) -> None:
    picky = _copy(tiny_model, tmp_path)
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    settings = json.loads((picky / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = template + CHAT_TEMPLATE
    (picky / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    teacher = MlxTeacher(str(picky))
    alone = [await teacher.ask(ask_for("add", 9)), await teacher.ask(ask_for("y", 30))]
    first, too_long, systemic, second = await ask_at_once(
        teacher, [ask_for("add", 9), ask_for("word " * CONTEXT), ask_for("add", system="S"), ask_for("y", 30)]
    )
    assert said([first, second]) == said(alone)
    for failure, words in ((too_long, "leave no room"), (systemic, "no system here")):
        assert isinstance(failure, TeacherError)
        assert not isinstance(failure, TeacherUnavailableError)
        assert words in failure.message
        assert failure.message.startswith(teacher.spec)
    await teacher.close()


async def test_one_that_is_taken_back_does_not_harm_the_others(tiny_model: Path) -> None:
    teacher = MlxTeacher(str(tiny_model), batch_size=3)
    kept = [ask_for("add", 300), ask_for("y", 200), ask_for("waits", 5)]
    expected = said([await teacher.ask(request) for request in kept])
    going = [asyncio.create_task(teacher.ask(ask_for(f"gone {at}", 2000))) for at in range(3)]
    staying = [asyncio.create_task(teacher.ask(request)) for request in kept]
    await asyncio.sleep(0.15)
    for task in going:
        task.cancel()
    # Were the places of those taken back not free, nothing would be answered before their 2,000 tokens.
    assert said(await asyncio.gather(*staying)) == expected
    assert all(task.cancelled() for task in going)
    await teacher.close()


async def test_all_taken_back_leaves_nothing_at_work(teacher: MlxTeacher) -> None:
    await teacher.ask(ask_for("warm", 1))
    task = asyncio.create_task(teacher.ask(ask_for("add", 2000)))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert teacher._driver is not None
    await asyncio.wait_for(teacher._driver, timeout=1)
    assert (await teacher.ask(ask_for("add", 4))).usage.output_tokens == 4


async def test_closing_ends_the_thread_and_fails_what_is_asked(tiny_model: Path) -> None:
    teacher = MlxTeacher(str(tiny_model))
    await teacher.ask(ask_for("warm", 1))
    assert _mlx_threads() == 1
    waiting = asyncio.create_task(teacher.ask(ask_for("add", 2000)))
    await asyncio.sleep(0.05)
    await teacher.close()
    assert _mlx_threads() == 0
    with pytest.raises(TeacherError, match="closed before it had answered"):
        await waiting
    with pytest.raises(TeacherError, match="is closed"):
        await teacher.ask(ask_for("add"))
    await teacher.close()


async def test_a_failure_of_the_model_reaches_all_who_wait_and_the_next_is_answered(
    teacher: MlxTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_lm.generate import GenerationBatch

    expected = said([await teacher.ask(ask_for("add", 5))])
    real = GenerationBatch.next

    def fail_late(self: GenerationBatch) -> list[GenerationBatch.Response]:
        if len(self) and self._num_tokens[0] > 3:
            raise RuntimeError("[malloc] Unable to allocate")
        return list(real(self))

    monkeypatch.setattr(GenerationBatch, "next", fail_late)
    failures = await ask_at_once(teacher, [ask_for("add", 9), ask_for("y", 9)])
    for failure in failures:
        assert isinstance(failure, TeacherError)
        assert "RuntimeError: [malloc] Unable to allocate" in failure.message
        assert "--concurrency" in str(failure)
    assert failures[0] is not failures[1]
    monkeypatch.undo()
    assert said([await teacher.ask(ask_for("add", 5))]) == expected


async def test_a_model_that_does_not_load_is_of_no_use(tmp_path: Path) -> None:
    no_template = make_tiny_model(tmp_path / "model", chat_template=None)
    teacher = MlxTeacher(str(no_template))
    for failure in await ask_at_once(teacher, [ask_for("a"), ask_for("b")]):
        assert isinstance(failure, TeacherUnavailableError)
        assert "chat template" in failure.message
    await teacher.close()


def test_a_model_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        open_teacher(f"mlx:{tmp_path / 'nothing'}")
    with pytest.raises(ConfigError):
        open_teacher("mlx:")


async def test_the_revision_is_that_of_the_content(tiny_model: Path, tmp_path: Path) -> None:
    teacher = open_teacher(f"mlx:{tiny_model}")
    assert isinstance(teacher, Revisioned)
    assert request_name(teacher) == f"mlx:{tiny_model}@{teacher.revision}"
    moved = open_teacher(f"mlx:{_copy(tiny_model, tmp_path / 'moved')}")
    trained = open_teacher(f"mlx:{make_tiny_model(tmp_path / 'trained', seed=1)}")
    template = _copy(tiny_model, tmp_path / "template")
    (template / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    revisions = [getattr(other, "revision", None) for other in (moved, trained, open_teacher(f"mlx:{template}"))]
    assert revisions[0] == teacher.revision
    assert len({teacher.revision, *revisions}) == 3


@pytest.mark.parametrize(
    ("front", "licence", "words"),
    [
        ("license: apache-2.0", "apache-2.0", "is free"),
        ("license: mit", "mit", "is free"),
        ("license: other\nlicense_name: qwen-research", "qwen-research", "Read there"),
        ("license: llama3.2", "llama3.2", "Read there"),
        (None, "unknown", "state no licence"),
    ],
)
def test_the_terms_are_those_of_the_model(
    tiny_model: Path, tmp_path: Path, front: str | None, licence: str, words: str
) -> None:
    folder = _copy(tiny_model, tmp_path)
    if front is not None:
        (folder / "README.md").write_text(f"---\n{front}\n---\n# Model\n", encoding="utf-8")
    terms = MlxTeacher(str(folder)).terms()
    assert terms.licence == licence
    assert words in terms.summary
    assert not terms.requires_acceptance


def test_it_costs_nothing() -> None:
    assert price_of("mlx:Qwen/Qwen2.5-7B-Instruct") == FREE


@pytest.mark.parametrize("ending", ["await teacher.close()", "pass", "raise KeyboardInterrupt"])
def test_a_process_ends_cleanly_closed_or_not(tiny_model: Path, ending: str) -> None:
    script = (
        "import asyncio, sys\n"
        "from mlx_distill.records import Message, Request\n"
        "from mlx_distill.teachers.mlx import MlxTeacher\n"
        "async def main():\n"
        f"    teacher = MlxTeacher({str(tiny_model)!r})\n"
        "    message = Message(role='user', content='add')\n"
        "    request = Request(prompt_id='p', family='p', teacher='t', messages=(message,), max_tokens=3)\n"
        "    print((await teacher.ask(request)).usage.output_tokens)\n"
        "    task = asyncio.create_task(teacher.ask(request.model_copy(update={'max_tokens': 2000})))\n"
        "    await asyncio.sleep(0.05)\n"
        f"    {ending}\n"
        "try:\n    asyncio.run(main())\nexcept KeyboardInterrupt:\n    pass\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONWARNINGS": "error"}
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert (run.returncode, run.stdout) == (0, "3\n"), run.stderr


def _tokens_written(folder: Path, text: str, count: int) -> list[int]:
    """What the model writes, by mlx-lm's plain one-request generation: an opinion other than the batch's."""
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    from mlx_distill.backends.mlx.generation import ChatModel

    model = ChatModel(folder)
    prompt = model.encode([Message(role="user", content=text)])
    steps = generate_step(mx.array(prompt), model._model, max_tokens=count)
    return [int(token) for token, _ in steps]


def _copy(folder: Path, parent: Path, **config: int) -> Path:
    target = parent / "copy"
    shutil.copytree(folder, target)
    if config:
        path = target / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **config}), encoding="utf-8")
    return target


def _mlx_threads() -> int:
    return sum(thread.name.startswith("mlx-teacher") for thread in threading.enumerate())


def test_it_outlives_an_event_loop_that_was_cut_off(tiny_model: Path) -> None:
    teacher = MlxTeacher(str(tiny_model), batch_size=1)

    async def cut_off() -> Reply:
        leaving = asyncio.create_task(teacher.ask(ask_for("left behind", 2000)))
        await asyncio.sleep(0.3)
        assert not leaving.done()
        return await teacher.ask(ask_for("add", 2000))

    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(cut_off(), timeout=0.5))

    async def again() -> Reply:
        try:
            return await asyncio.wait_for(teacher.ask(ask_for("add", 4)), timeout=2)
        finally:
            await teacher.close()

    assert asyncio.run(again()).usage.output_tokens == 4
