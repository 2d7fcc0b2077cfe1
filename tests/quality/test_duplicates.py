"""Duplicates: what is near is found, what is dropped is near, and the first stays."""

from __future__ import annotations

import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distill.code_blocks import code_blocks
from mlx_distill.errors import ConfigError
from mlx_distill.prompts import fold, load_prompts
from mlx_distill.quality.duplicates import DEFAULT_THRESHOLD, bands_for, jaccard, near_duplicates, shingles

DATA = Path(__file__).parents[2] / "data"
WORDS = [f"{a}{b}{c}" for a in ("ka", "lo", "mi", "tes") for b in ("ran", "ve", "do") for c in ("lin", "s", "tor")]


def prose(generator: random.Random, words: int) -> list[str]:
    return [generator.choice(WORDS) + str(generator.randint(0, 999)) for _ in range(words)]


def similarity(a: str, b: str) -> float:
    return jaccard(shingles(a), shingles(b))


def test_case_and_white_space_do_not_make_a_text_new() -> None:
    texts = {"a": "Sort a list.", "b": "  sort\tA\n\nLIST. ", "c": "Sort a list!"}
    assert near_duplicates(texts, threshold=1) == {"b": "a"}


def test_the_first_in_order_stays() -> None:
    text = " ".join(prose(random.Random(1), 100))
    assert near_duplicates({"z": text, "a": text, "m": text + " more"}) == {"a": "z", "m": "z"}


def test_an_exact_copy_of_a_dropped_text_points_to_the_one_that_stays() -> None:
    text = " ".join(prose(random.Random(2), 100))
    assert near_duplicates({"a": text, "b": text + " x", "c": text + " x"}) == {"b": "a", "c": "a"}


def test_a_chain_of_small_changes_does_not_drop_its_far_end() -> None:
    words = prose(random.Random(3), 200)
    chain = {}
    for step in range(12):
        chain[str(step)] = " ".join(words)
        words = [*words[:-6], *prose(random.Random(100 + step), 6)]
        words = words[6:] + words[:6]
    dropped = near_duplicates(chain)
    assert dropped
    assert all(similarity(chain[copy], chain[kept]) >= DEFAULT_THRESHOLD for copy, kept in dropped.items())
    assert not set(dropped) & set(dropped.values())


def test_the_shipped_prompts_are_all_different() -> None:
    prompts = {prompt.id: prompt.text for prompt in load_prompts(DATA / "prompts" / "coding.toml")}
    assert len(prompts) == 104
    assert near_duplicates(prompts) == {}
    assert max(similarity(a, b) for a, b in combinations(prompts.values(), 2)) < 0.86


def test_the_shipped_answers_are_all_different() -> None:
    answers = {path.stem: path.read_text(encoding="utf-8") for path in (DATA / "starter" / "answers").glob("*.md")}
    assert all(code_blocks(text) for name, text in answers.items() if not name.startswith("explain-"))
    assert near_duplicates(answers) == {}
    assert near_duplicates(answers, threshold=0.6) == {}


def test_one_word_changed_in_a_prompt_is_near() -> None:
    prompt = next(p.text for p in load_prompts(DATA / "prompts" / "coding.toml") if len(p.text) > 350)
    words = prompt.split()
    words[len(words) // 2] = "thing"
    assert near_duplicates({"a": prompt, "b": " ".join(words)}) == {"b": "a"}


def test_repeating_oneself_is_not_saying_the_same() -> None:
    assert similarity("ha" * 50, "ha" * 5000) == 1
    assert near_duplicates({"a": "ha" * 50, "b": "ha" * 5000, "c": "ha" * 4900}) == {"c": "b"}


def test_short_empty_and_broken_texts() -> None:
    texts = {
        "a": "",
        "b": " \n ",
        "c": "x",
        "d": "X ",
        "e": "y",
        "f": "\ud800",
        "g": "\ud800",
        "h": "\0" * 8,
        "i": "日本",
    }
    assert near_duplicates(texts) == {"b": "a", "d": "c", "g": "f"}


def test_no_texts() -> None:
    assert near_duplicates({}) == {}


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.01, float("nan")])
def test_a_threshold_that_means_nothing_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError):
        near_duplicates({"a": "b"}, threshold=threshold)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_a_pair_at_the_threshold_shares_a_band(threshold: float) -> None:
    bands = bands_for(threshold)
    assert 256 % bands == 0
    assert (1 - threshold ** (256 // bands)) ** bands < 1e-3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(alphabet="ab c", max_size=60), max_size=12), st.sampled_from([0.3, 0.5, 0.8, 0.9, 1.0]))
def test_what_is_dropped_is_near_and_what_stays_is_not(texts: list[str], threshold: float) -> None:
    by_id = {str(place): text for place, text in enumerate(texts)}
    dropped = near_duplicates(by_id, threshold=threshold)
    kept = [identity for identity in by_id if identity not in dropped]
    for copy, original in dropped.items():
        assert original in kept
        assert int(original) < int(copy)
        same = fold(by_id[copy]) == fold(by_id[original])
        assert same or similarity(by_id[copy], by_id[original]) >= threshold or original != copy
        # An exact copy of a near duplicate is dropped with it, so nearness may rest on the text between.
        between = [t for t in by_id.values() if fold(t) == fold(by_id[copy])]
        assert any(similarity(t, by_id[original]) >= threshold for t in between)
    assert len({fold(by_id[identity]) for identity in kept}) == len(kept)


def test_nearly_all_pairs_above_the_threshold_are_found_and_none_below() -> None:
    generator = random.Random(7)
    texts: dict[str, str] = {}
    near = {}
    for number in range(300):
        words = prose(generator, 120)
        texts[f"base{number}"] = " ".join(words)
        for place in generator.sample(range(120), generator.randint(1, 14)):
            words[place] = generator.choice(WORDS) + "changed"
        texts[f"edit{number}"] = " ".join(words)
        near[number] = similarity(texts[f"base{number}"], texts[f"edit{number}"]) >= DEFAULT_THRESHOLD
    dropped = near_duplicates(texts)
    expected = {f"edit{number}": f"base{number}" for number, is_near in near.items() if is_near}
    assert 50 < len(expected) < 250
    assert set(dropped.items()) <= set(expected.items())
    assert len(dropped) >= 0.99 * len(expected)


def test_a_common_beginning_of_all_texts_does_not_hide_a_copy() -> None:
    generator = random.Random(8)
    beginning = " ".join(prose(generator, 150))
    texts = {str(n): f"{beginning} {' '.join(prose(generator, 14))}" for n in range(400)}
    assert all(similarity(texts["0"], texts[str(n)]) > 0.75 for n in range(1, 20))
    copy = texts["200"].replace(beginning, beginning + " indeed")
    dropped = near_duplicates({**texts, "copy": copy})
    assert dropped == {"copy": "200"}


def test_another_process_gives_the_same_result() -> None:
    program = """
import random
from mlx_distill.quality.duplicates import near_duplicates
draw = random.Random(5)
texts = {str(n): "".join(draw.choices("ab", k=300)) for n in range(200)}
print(sorted(near_duplicates(texts, threshold=0.55).items()))
"""
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            cwd=DATA.parent,
            env={"PYTHONHASHSEED": seed, "PATH": "/usr/bin:/bin"},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1
    assert "('" in outputs.pop()
