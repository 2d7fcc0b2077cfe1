"""Rows to train on: this project's starter answers, cut to drawn lengths. The same seed gives the same rows."""

from __future__ import annotations

import json
import random
import tomllib
from pathlib import Path
from typing import Any

from mlx_distill.layout import bundled

#: Of this many families of answers, one is kept for validation.
_VALID_EVERY = 5

#: Share of a row that its answer takes at least.
_ANSWER_SHARE = 0.3

Pair = tuple[str, str]


def write_rows(path: Path, tokenizer: Any, *, split: str, count: int, shortest: int, longest: int, seed: int) -> None:
    """Write chats of one question and one answer.

    Their lengths are spread evenly from `shortest` to `longest` tokens, chat template included, and shuffled. An
    answer ends at the end of a word; where one alone is too short for its row, the beginning of another follows.

    Args:
        split: "train" or "valid"; what one has of an answer, the other has not.
    """
    generator = random.Random(f"{seed} {split}")
    pool = _answers(split)
    lengths = [shortest + round((longest - shortest) * (at + 0.5) / count) for at in range(count)]
    generator.shuffle(lengths)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        waiting: list[Pair] = []
        for length in lengths:
            if len(waiting) < len(pool):
                waiting += generator.sample(pool, len(pool))
            messages = _chat(waiting, length, tokenizer)
            file.write(json.dumps({"messages": messages}) + "\n")


def _answers(split: str) -> list[Pair]:
    """The questions and answers of the families of a split."""
    folder = bundled("starter/answers")
    assert folder is not None
    families: dict[str, list[Pair]] = {}
    for path in sorted(folder.glob("*.md")):
        _, head, answer = path.read_text(encoding="utf-8").split("+++\n", 2)
        question = tomllib.loads(head)
        families.setdefault(question["id"].partition("--")[0], []).append((question["prompt"].strip(), answer.strip()))
    wanted = [pairs for at, pairs in enumerate(families.values()) if (at % _VALID_EVERY == 0) == (split == "valid")]
    return [pair for pairs in wanted for pair in pairs]


def _chat(waiting: list[Pair], length: int, tokenizer: Any) -> list[dict[str, str]]:
    """A chat of at most `length` tokens and little less; what it takes is gone from `waiting`."""
    budgets = (length - _tokens(_messages(question, ""), tokenizer) for question, _ in waiting)
    at, budget = next((at, room) for at, room in enumerate(budgets) if room >= _ANSWER_SHARE * length)
    question, answer = waiting.pop(at)
    while len(ends := _ends(answer, tokenizer)) <= budget:
        answer += "\n\n" + waiting.pop(0)[1]
    # A word that is cut is left out; the chat template's own tokens can join with the text's last.
    answer = answer[: ends[budget - 1]]
    while _tokens(_messages(question, answer), tokenizer) > length or not answer[-1].isspace():
        answer = answer[:-1]
    return _messages(question, answer.rstrip())


def _messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _tokens(messages: list[dict[str, str]], tokenizer: Any) -> int:
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _ends(text: str, tokenizer: Any) -> list[int]:
    """Where each token of a text ends, in characters."""
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [end for _, end in offsets]
