"""In what two tokenizers' words differ."""

from __future__ import annotations

import pytest

from mlx_distill.vocabulary import differing_words, vocabulary_sha256


class Words:
    """A tokenizer, as far as its vocabulary goes."""

    def __init__(self, **ids: int) -> None:
        self._ids = ids

    def get_vocab(self) -> dict[str, int]:
        return dict(self._ids)


def test_the_order_in_which_words_are_listed_is_no_difference() -> None:
    one, other = Words(a=0, b=1), Words(b=1, a=0)
    assert differing_words(one, other) is None
    assert vocabulary_sha256(one) == vocabulary_sha256(other)


@pytest.mark.parametrize(
    ("teacher", "student", "said"),
    [
        (Words(a=0, b=1), Words(a=0), "1 only the teacher's ('b')"),
        (Words(a=0), Words(a=0, b=1), "1 only the student's ('b')"),
        (Words(a=0, b=1), Words(a=1, b=0), "2 under another id ('b': 1 and 0, 'a': 0 and 1)"),
        (
            Words(a=0, e=4, d=3, c=2, b=1),
            Words(a=5, x=6),
            "4 only the teacher's ('b', 'c', 'd', …), 1 only the student's ('x'), 1 under another id ('a': 0 and 5)",
        ),
    ],
)
def test_what_differs_is_counted_and_named(teacher: Words, student: Words, said: str) -> None:
    assert differing_words(teacher, student) == f"their vocabularies differ: {said}"
    assert vocabulary_sha256(teacher) != vocabulary_sha256(student)


def test_a_word_of_control_characters_is_quoted() -> None:
    assert "'\\x1b[2J'" in str(differing_words(Words(**{"\x1b[2J": 0}), Words()))
