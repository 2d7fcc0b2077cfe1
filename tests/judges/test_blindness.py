"""No judge is told whom it judges, whatever the contenders are called and whatever their answers say."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mlx_distill.judges.base import Pair
from mlx_distill.judges.blind import blinded
from mlx_distill.judges.llm import LlmJudge
from mlx_distill.judges.run import names_in
from mlx_distill.records import Generation
from tests.judges.judging import Panellist, generation, question_of

JUDGE = LlmJudge(Panellist())

_PART = st.text("abcdefghijklmnopqrstuvwxyzABCXYZ0123456789", min_size=1, max_size=6)
#: Such as run folders, Hub ids and what a person calls a contender: more than a plain word.
CONTENDER = st.builds("{}{}{}{}".format, st.sampled_from("QXZqxz"), _PART, st.sampled_from("-_."), _PART)
MODEL = st.builds(
    "{}{}{}{}{}".format,
    st.sampled_from(["", "mlx:", "openai:", "anthropic:", "some-owner/"]),
    st.sampled_from("QXZqxz"),
    _PART,
    st.sampled_from(["-", "_", ".", "+", "(", " ", "*", "[", "\\d", "-7b@"]),
    _PART,
)


def mentioning(*names: str) -> str:
    """An answer that names somebody in prose and in code, and claims to be it."""
    said = "\n".join(
        f'Hello, {name} here; "{name}" ({name}), {name.upper()}, ask {name}!\nI am {name}. As {name}, I sort.\n'
        f"```python\n# by {name}\nauthor = '{name}'\nprint({name!r}, sorted([b, a]))\n```\n~~~\n{name}\n"
        for name in names
    )
    return f"{said}\nI was made by {names[0]}."


def asked(answers: list[Generation]) -> list[str]:
    """Every question about these answers to one prompt, one by one and as a pair."""
    names = names_in(answers)
    pair = Pair(answers[0], answers[1], names)
    requests = [*(JUDGE.request(one, names) for one in answers), JUDGE.pair_request(pair)]
    return [f"{request.system}\n{question_of(request)}" for request in requests]


@given(st.lists(CONTENDER, min_size=2, max_size=2, unique_by=str.lower), st.lists(MODEL, min_size=2, max_size=2))
def test_no_name_of_any_contender_reaches_a_question(contenders: list[str], models: list[str]) -> None:
    secrets = [*contenders, *models]
    text = mentioning(*secrets)
    answers = [generation("sort", who, text, model=model) for who, model in zip(contenders, models, strict=True)]
    for question in asked(answers):
        for secret in secrets:
            assert secret.lower() not in question.lower()
            assert secret.rpartition("/")[2].lower() not in question.lower()
        assert "sorted([b, a])" in question


@given(st.lists(CONTENDER, min_size=2, max_size=2, unique_by=str.lower), CONTENDER, CONTENDER)
def test_questions_are_the_same_whatever_the_contenders_are_called(contenders: list[str], one: str, other: str) -> None:
    """Nothing of a name is left: not its length, not its sort, not where it would have stood among others."""
    assume(len({one.lower(), other.lower(), *map(str.lower, contenders)}) == 4)

    def questions(first: str, second: str) -> list[str]:
        # Each names itself and the other.
        texts = [f"I prefer {first} to {second}: `{first}`.", f"Not {first}.\n```\n{second}_client({first})\n```\n"]
        return asked(
            [generation("sort", who, text, model="m") for who, text in zip((first, second), texts, strict=True)]
        )

    assert questions(*contenders) == questions(one, other)


@given(st.permutations(["teacher", "base", "distilled", "champion"]))
def test_plain_names_are_only_labels(order: list[str]) -> None:
    """They are words of many an answer and stay there; nothing else depends on who is called by them."""
    texts = ["The base case of a teacher's table.", "class Teacher: champion = 1"]
    found = asked([generation("sort", who, text, model="m") for who, text in zip(order[:2], texts, strict=True)])
    plain = [generation("sort", who, text, model="m") for who, text in zip(("base", "distilled"), texts, strict=True)]
    assert found == asked(plain)
    assert "base case of a teacher's table" in found[0]
    assert "class Teacher: champion = 1" in found[1]


@pytest.mark.parametrize(
    "says",
    ["I am champion.", "I'm the champion, hello.", "My name is Champion.", "# written by champion", "Author: champion"],
)
def test_a_plain_name_goes_where_somebody_is_introduced_by_it(says: str) -> None:
    for text in (says, f"```python\n{says}\n```"):
        assert "champion" not in blinded(text, "champion").lower()
    assert blinded("A champion sorts.", "champion") == "A champion sorts."


@pytest.mark.parametrize(
    "text",
    ["I am the distilled model of the two.", "As the student model, I agree. As a distilled model, I sort."],
)
def test_a_part_in_the_comparison_is_not_told(text: str) -> None:
    assert "distilled model" not in blinded(text, "m")


@pytest.mark.parametrize("joint", ["\u200b", "\u2060", "\ufeff", "\u00ad"])
def test_a_name_is_not_hidden_by_what_is_not_seen(joint: str) -> None:
    text = f"I come from Cl{joint}aude, or from student{joint}-v2."
    question = asked([generation("sort", "student-v2", text), generation("sort", "base", text)])[0]
    assert "aude" not in question
    assert "v2" not in question


@pytest.mark.parametrize(
    "written", ["my-run-7", "my_run_7", "MY.RUN.7", "my/run-7", "load_my_run_7_model", "my-run-7@ab12"]
)
def test_a_name_is_known_with_other_signs_between_its_parts(written: str) -> None:
    for text in (f"See {written}.", f"```\n{written}()\n```"):
        assert "run" not in blinded(text, "my-run-7@ab12").replace("\n", "").lower()
