"""Answers of a local model: mlx-lm's greedy ones, within the budget, whatever else is in the batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from mlx_lm import generate, load
from mlx_lm.sample_utils import make_sampler

from mlx_distill.backends.mlx.generation import Answer, Generator
from mlx_distill.errors import InputError, ModelError
from mlx_distill.progress import Bar
from mlx_distill.records import Message
from tests.tiny import make_tiny_model

TEXTS = ("add", "for item in items", "print the largest number of a list " * 6, "y", "class Node:\n    pass")


def talk(text: str, *, system: str | None = None) -> list[Message]:
    first = [Message(role="system", content=system)] if system else []
    return [*first, Message(role="user", content=text)]


@pytest.fixture(scope="module")
def generator(tiny_model: Path) -> Generator:
    return Generator(tiny_model)


def answers(
    generator: Generator, conversations: Sequence[Sequence[Message]], *, max_tokens: int = 24, batch_size: int = 8
) -> list[Answer]:
    found = list(generator.answer(conversations, max_tokens=max_tokens, batch_size=batch_size))
    assert sorted(answer.index for answer in found) == list(range(len(conversations)))
    return sorted(found, key=lambda answer: answer.index)


def said(found: Sequence[Answer]) -> list[tuple[str, str, int]]:
    return [(answer.text, answer.stop, answer.tokens) for answer in found]


def test_an_answer_is_mlx_lms_greedy_one(generator: Generator, tiny_model: Path) -> None:
    model, tokenizer = load(str(tiny_model))
    for answer, text in zip(answers(generator, [talk(t) for t in TEXTS]), TEXTS, strict=True):
        messages = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        expected = generate(model, tokenizer, prompt, max_tokens=24, sampler=make_sampler(temp=0.0))
        assert answer.text == expected


@pytest.mark.parametrize("batch_size", [1, 2, 3, 99])
def test_an_answer_does_not_depend_on_what_is_asked_beside_it(generator: Generator, batch_size: int) -> None:
    alone = [answers(generator, [talk(text)])[0] for text in TEXTS]
    together = answers(generator, [talk(text) for text in TEXTS], batch_size=batch_size)
    assert said(together) == said(alone)
    assert len({answer.text for answer in together}) == len(TEXTS)
    back = answers(generator, [talk(text) for text in reversed(TEXTS)], batch_size=batch_size)
    assert said(back[::-1]) == said(alone)


def test_a_system_prompt_counts(generator: Generator) -> None:
    plain, with_system = answers(generator, [talk("add"), talk("add", system="Be short.")])
    assert plain.text != with_system.text


@pytest.mark.parametrize("budget", [1, 2, 7])
def test_the_budget_is_kept_and_told(generator: Generator, budget: int) -> None:
    found = answers(generator, [talk(text) for text in TEXTS], max_tokens=budget)
    assert [(answer.stop, answer.tokens) for answer in found] == [("length", budget)] * len(TEXTS)


def ending_model(folder: Path, text: str, budget: int) -> tuple[Path, str]:
    """A tiny model that ends its answer to a text before the budget: one of the tokens it says is made its end mark."""
    make_tiny_model(folder)
    full = answers(Generator(folder), [talk(text)], max_tokens=budget)[0]
    tokenizer_file = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = load(str(folder))[1].encode(full.text, add_special_tokens=False)
    end = next(token for token in tokens[2:] if token != tokens[0])
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["eos_token_id"] = [config["eos_token_id"], end]
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    name = next(key for key, value in tokenizer_file["model"]["vocab"].items() if value == end)
    return folder, name


def test_an_answer_that_ends_by_itself_is_told_from_a_cut_one(tmp_path: Path) -> None:
    folder, _ = ending_model(tmp_path / "model", "add", 24)
    cut = answers(Generator(make_tiny_model(tmp_path / "plain")), [talk("add")])[0]
    ended = answers(Generator(folder), [talk("add")])[0]
    assert (cut.stop, ended.stop) == ("length", "end")
    assert ended.tokens < 24
    assert cut.text.startswith(ended.text)
    exact = answers(Generator(folder), [talk("add")], max_tokens=ended.tokens + 1)[0]
    assert said([exact]) == said([ended])
    assert answers(Generator(folder), [talk("add")], max_tokens=ended.tokens)[0].stop == "length"


def test_the_bar_counts_the_tokens_written(generator: Generator) -> None:
    class Counting(Bar):
        total = 0.0

        def advance(self, amount: float = 1, **fields: str) -> None:
            self.total += amount

    bar = Counting()
    found = list(generator.answer([talk(t) for t in TEXTS], max_tokens=9, batch_size=2, bar=bar))
    assert bar.total == sum(answer.tokens for answer in found)


def test_a_prompt_that_does_not_fit_is_refused_by_name_before_any_is_answered(generator: Generator) -> None:
    conversations = [talk("add"), talk("x " * 3000)]
    with pytest.raises(InputError, match=r"long-one: \d+ tokens of prompt and 24 of answer do not fit .* 2048"):
        generator.answer(conversations, max_tokens=24, batch_size=2, names=["short-one", "long-one"])
    with pytest.raises(InputError, match="conversation 2: "):
        generator.answer(conversations, max_tokens=24, batch_size=2)
    with pytest.raises(InputError, match=r"short-one: .* and 2048 of answer"):
        generator.answer(conversations[:1], max_tokens=2048, batch_size=2, names=["short-one"])


def test_no_conversations_are_no_answers(generator: Generator) -> None:
    assert answers(generator, []) == []


def test_it_can_be_left_in_the_middle(generator: Generator) -> None:
    expected = said(answers(generator, [talk(text) for text in TEXTS]))
    for _ in generator.answer([talk(text) for text in TEXTS], max_tokens=24, batch_size=1):
        break
    assert said(answers(generator, [talk(text) for text in TEXTS])) == expected


def test_a_model_that_cannot_chat_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        Generator(make_tiny_model(tmp_path / "base", chat_template=None))


def test_what_the_template_refuses_is_told(tmp_path: Path) -> None:
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    model = Generator(make_tiny_model(tmp_path / "model", chat_template=refuses))
    with pytest.raises(InputError, match="no system role"):
        model.answer([talk("add", system="Be short.")], max_tokens=2, batch_size=1)


def test_a_repetition_penalty_breaks_a_loop(tiny_model: Path) -> None:
    """A random model, greedy, soon says the same few words for ever; under a penalty it says more different ones."""
    conversation = [[Message(role="user", content="Say something.")]]
    generator = Generator(tiny_model)

    def distinct(penalty: float) -> int:
        (answer,) = generator.answer(conversation, max_tokens=60, batch_size=1, repetition_penalty=penalty)
        return len(set(answer.text))

    assert distinct(1.0) < distinct(2.0)
