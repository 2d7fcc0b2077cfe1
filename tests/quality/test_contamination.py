"""Contamination: light edits of a held-out prompt are caught, other tasks are not."""

from __future__ import annotations

import random
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distill.prompts import load_prompts
from mlx_distill.quality.contamination import contaminated

PROMPTS = Path(__file__).parents[2] / "data" / "prompts"
TRAINING = {prompt.id: prompt.text for prompt in load_prompts(PROMPTS / "coding.toml")}
HELD_OUT = {prompt.id: prompt.text for prompt in load_prompts(PROMPTS / "heldout.toml")}
BASES = {identity: text for identity, text in TRAINING.items() if "--" not in identity}
COURTESIES = ("Hi! Could you please help me with the following?\n\n", "Please, ", "I need this for work: ")
ADDITIONS = (
    "\n\nInclude a small set of unit tests that cover the normal and the edge cases.",
    "\n\nWrite it as you would for production: typed, documented and ready for review.",
)


def test_no_shipped_training_prompt_is_contaminated() -> None:
    assert len(TRAINING) == 104
    assert contaminated(TRAINING, HELD_OUT) == {}


def test_the_shipped_tasks_do_not_contaminate_one_another() -> None:
    for identity, text in BASES.items():
        others = {name: other for name, other in BASES.items() if name != identity}
        assert contaminated({identity: text}, others) == {}


@pytest.mark.parametrize("identity", HELD_OUT)
def test_light_edits_are_caught(identity: str) -> None:
    text = HELD_OUT[identity]
    edits = {
        "copy": text,
        "capitals": text.upper(),
        "no punctuation": text.translate(str.maketrans("", "", string.punctuation.replace("_", ""))),
        "one line": " ".join(text.split()),
        "wide letters": text.replace("a", "\uff41"),
        "courtesy": COURTESIES[0] + text,
        "addition": text + ADDITIONS[0],
        "all of it": COURTESIES[0] + text.lower() + ADDITIONS[1],
        "a part": text[: len(text) * 2 // 3],
        "sentences turned": " ".join(reversed(text.strip().split(". "))),
    }
    assert contaminated(edits, HELD_OUT) == dict.fromkeys(edits, identity)


@pytest.mark.parametrize("identity", [*HELD_OUT, *BASES])
def test_three_words_changed_are_caught(identity: str) -> None:
    held_out = {**HELD_OUT, **BASES}
    generator = random.Random(identity)
    edits = {}
    for number in range(20):
        words = held_out[identity].split()
        for place in generator.sample(range(len(words)), 3):
            words[place] = generator.choice(["fast", "server", "object", "thing", "value"])
        edits[str(number)] = generator.choice(COURTESIES) + " ".join(words) + generator.choice(ADDITIONS)
    assert contaminated(edits, held_out) == dict.fromkeys(edits, identity)


@pytest.mark.parametrize(
    ("prompt", "held_out"),
    [
        ("Write a Python function that reverses a string.", "Write a Python function that reverses a linked list."),
        ("Write a Python function that checks whether a number is prime.", "Write a function that returns primes."),
        ("Implement a stack using two queues.", "Implement a priority queue with a heap."),
        ("Write a SQL query for the top 3 customers.", "Write a SQL query for the ten worst sellers."),
        ("Explain what a hash table is.", "Explain what a binary search tree is."),
    ],
)
def test_short_prompts_with_the_same_frame_are_different(prompt: str, held_out: str) -> None:
    assert contaminated({"a": prompt}, {"b": held_out}) == {}


def test_a_short_prompt_inside_a_long_one_is_not_a_part_of_it() -> None:
    assert contaminated({"a": "Sort the busy intervals."}, BASES) == {}


def test_the_closest_is_named() -> None:
    text = HELD_OUT["connection-pool"]
    near = {"far": text.replace("thread-safe", "small").replace("timeout error", "failure"), "near": text}
    assert contaminated({"a": text}, near) == {"a": "near"}
    assert contaminated({"a": text}, {"first": text, "second": text}) == {"a": "first"}


def test_a_verdict_does_not_depend_on_other_prompts() -> None:
    edit = {"edit": HELD_OUT["ttl-cache-decorator"].replace("decorator", "wrapper")}
    assert (
        contaminated({**TRAINING, **edit}, HELD_OUT) == contaminated(edit, HELD_OUT) == {"edit": "ttl-cache-decorator"}
    )


def test_scripts_without_blanks_are_compared_by_character() -> None:
    held_out = {"jp": "与えられた木が平衡しているかどうかを調べる関数を書いてください。"}
    edits = {"same": "お願いします。" + held_out["jp"], "other": "文字列を逆順にするプログラムを作る。"}
    assert contaminated(edits, held_out) == {"same": "jp"}


def test_empty_texts_contaminate_nothing() -> None:
    assert contaminated({"a": "", "b": "?!"}, {"c": "", "d": "..."}) == {}
    assert contaminated({}, HELD_OUT) == contaminated(TRAINING, {}) == {}


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200), st.text(max_size=200), st.text(max_size=200))
def test_a_copy_is_caught_whatever_stands_around_it(before: str, text: str, after: str) -> None:
    found = contaminated({"a": f"{before} . {text} . {after}"}, {"b": text})
    words = [word for word in text.split() if any(c.isalnum() for c in word)]
    if len(words) >= 12:
        assert found == {"a": "b"}


def test_hostile_sizes_take_seconds() -> None:
    hostile = {"one word": "a" * 1_000_000, "many": "a b " * 250_000, "marks": "?" * 1_000_000, "cjk": "木" * 300_000}
    assert contaminated(hostile, HELD_OUT) == {}
