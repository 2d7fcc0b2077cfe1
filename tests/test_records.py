"""The records that cross the seams: round trips, what is refused, and identities that hold."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from pydantic import ValidationError

from mlx_distill import manifest, records, run_records
from mlx_distill.manifest import Manifest, TeacherTerms
from mlx_distill.records import (
    ChatRow,
    DimensionScore,
    Generation,
    Message,
    Prompt,
    Record,
    Reply,
    Request,
    StopReason,
    Usage,
    Verdict,
    content_hash,
)
from mlx_distill.run_records import MetricRow, RunRecord
from mlx_distill.runs import FusedRecord

RECORDS = [
    found
    for module in (manifest, records, run_records)
    for _, found in inspect.getmembers(module, inspect.isclass)
    if issubclass(found, Record) and found != Record and found.__module__ == module.__name__
]

#: Records that open a file or a row of their own.
WITH_FORMAT = {"Manifest", "RunRecord", "Generation", "Verdict", "ComparisonRecord"}

TEXT = st.text(st.characters(codec="utf-8"))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
TOOL_CALLS = st.lists(st.dictionaries(TEXT, JSON, max_size=3), min_size=1, max_size=2)
MESSAGES = st.builds(
    Message,
    role=st.sampled_from(["system", "user", "assistant", "tool"]),
    content=TEXT,
    name=st.none() | TEXT,
    tool_calls=st.none() | TOOL_CALLS,
    tool_call_id=st.none() | TEXT,
)
REQUESTS = st.builds(
    Request,
    prompt_id=st.sampled_from(["p1", "p2"]),
    family=st.sampled_from(["f1", "f2"]),
    teacher=TEXT,
    messages=st.lists(MESSAGES, min_size=1, max_size=3),
    system=st.none() | TEXT,
    max_tokens=st.integers(1, 10**6),
    sample=st.integers(0, 99),
    temperature=st.none() | st.floats(0, 2),
)


def request(**changes: Any) -> Request:
    values: dict[str, Any] = {
        "prompt_id": "p",
        "family": "f",
        "teacher": "anthropic:m",
        "messages": (Message(role="user", content="Hi"),),
        "system": None,
        "max_tokens": 100,
    }
    return Request(**{**values, **changes})


def generation(**changes: Any) -> Generation:
    values: dict[str, Any] = {
        "prompt": Prompt(id="p", family="p", text="Hi"),
        "contender": "base",
        "model": "m@1",
        "text": "Hello",
        "stop": "end",
        "output_tokens": 3,
        "seconds": 0.5,
        "max_tokens": 10,
    }
    return Generation(**{**values, **changes})


# All records.


def test_there_are_records() -> None:
    assert {"ChatRow", "Prompt", "Request", "Reply"} | WITH_FORMAT <= {record.__name__ for record in RECORDS}


@pytest.mark.parametrize("record", [*RECORDS, FusedRecord])
def test_every_record_is_frozen_and_refuses_unknown_keys(record: type[Record]) -> None:
    assert record.model_config.get("frozen") is True
    assert record.model_config.get("extra") == "forbid"
    with pytest.raises(ValidationError) as caught:
        record.model_validate({"no_such_key": 1})
    assert ("extra_forbidden", ("no_such_key",)) in [(e["type"], e["loc"]) for e in caught.value.errors()]


@pytest.mark.parametrize("record", [*RECORDS, FusedRecord])
def test_records_with_a_file_of_their_own_carry_a_format(record: type[Record]) -> None:
    has = "format" in record.model_fields
    assert has == (record.__name__ in WITH_FORMAT | {"FusedRecord"})
    if has:
        with pytest.raises(ValidationError) as caught:
            record.model_validate({"format": 2})
        assert ("format",) in [error["loc"] for error in caught.value.errors()]


def test_a_frozen_record_stays_as_it_is() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Usage().input_tokens = 3  # type: ignore[misc]


# Round trips.


@given(st.builds(ChatRow, messages=st.lists(MESSAGES, min_size=1, max_size=4), tools=st.none() | TOOL_CALLS))
@examples(max_examples=100)
def test_a_row_comes_back_as_it_went_and_is_one_line(row: ChatRow) -> None:
    line = row.to_json()
    assert ChatRow.model_validate_json(line) == row
    assert "\n" not in line
    assert "\r" not in line


def test_nothing_of_a_tool_call_is_lost() -> None:
    calls = [{"id": "1", "function": {"name": "f", "arguments": {"x": None, "y": [None], "z": {"a": None}}}}]
    row = ChatRow(messages=(Message(role="assistant", tool_calls=calls),), tools=[{"default": None}])
    back = ChatRow.model_validate_json(row.to_json())
    assert back.messages[0].tool_calls == calls
    assert back.tools == [{"default": None}]


@given(REQUESTS)
@examples(max_examples=50)
def test_a_request_keeps_its_identity_through_json(asked: Request) -> None:
    back = Request.model_validate_json(asked.to_json())
    assert back == asked
    assert back.key == asked.key


@given(
    st.builds(
        Reply,
        text=TEXT,
        stop=st.sampled_from(get_args(StopReason)),
        stop_reason=st.none() | TEXT,
        usage=st.builds(Usage, input_tokens=st.integers(0, 2**53), output_tokens=st.integers(0, 2**53)),
        model=TEXT,
        seconds=st.floats(0, 1e9),
    )
)
@examples(max_examples=50)
def test_a_reply_comes_back_as_it_went(reply: Reply) -> None:
    assert Reply.model_validate_json(reply.to_json()) == reply


@given(loss=st.floats(allow_nan=False, allow_infinity=False), rate=st.none() | st.floats(0, 1))
@examples(max_examples=50)
def test_numbers_come_back_to_the_last_bit(loss: float, rate: float | None) -> None:
    row = MetricRow(
        kind="step",
        step=1,
        epoch=0.1,
        loss=loss,
        token_accuracy=1 / 3,
        target_tokens=3,
        tokens=7,
        seconds=0.1,
        learning_rate=rate,
    )
    assert MetricRow.model_validate_json(row.to_json()) == row


def test_what_is_not_set_is_left_out() -> None:
    assert Message(role="user", content="Hi").to_json() == '{"role":"user","content":"Hi"}'
    assert Message(role="user", content="").to_json() == '{"role":"user","content":""}'


def test_a_manifest_of_before_can_be_read() -> None:
    """Keys that came later have a value for those who did not know them."""
    first = {
        "format": 1,
        "name": "n",
        "created": "2026-11-01T00:00:00+00:00",
        "teacher": "recorded:x",
        "terms": {"teacher": "recorded:x", "licence": "MIT", "summary": "s"},
        "prompts": 1,
        "answered": 1,
        "rows": {"train": 1, "valid": 0, "test": 0},
        "families": {"train": 1, "valid": 0, "test": 0},
        "sha256": {"train": "0"},
    }
    manifest = Manifest.model_validate(first)
    assert (manifest.cost_usd, manifest.dropped, manifest.terms.accepted) == (0.0, (), False)
    assert (manifest.samples, manifest.temperature, manifest.asked, manifest.unit) == (1, None, 1, "prompts")
    several = Manifest.model_validate({**first, "prompts": 7, "samples": 3})
    assert (several.asked, several.unit) == (21, "requests")


def test_a_run_of_before_can_be_read() -> None:
    first = {
        "format": 1,
        "identity": "0",
        "status": "running",
        "created": "2026-11-01T00:00:00+00:00",
        "version": "0.1.0",
        "backend": "mlx",
        "device": "",
        "model": {"spec": "m", "source": "folder", "path": "/m", "name": "m"},
        "config": {},
        "splits": {"train": {"rows": 1, "tokens": 2, "target_tokens": 1, "sha256": "0"}},
        "trainable_parameters": 0,
    }
    assert RunRecord.model_validate(first).valid_loss is None


# What is refused.


@pytest.mark.parametrize(
    ("record", "values"),
    [
        (Message, {"role": "user"}),
        (Message, {"role": "assistant", "tool_calls": []}),
        (Message, {"role": "teacher", "content": "x"}),
        (Message, {"role": "user", "content": ["x"]}),
        (Message, {"role": "user", "content": 1}),
        (ChatRow, {"messages": []}),
        (ChatRow, {}),
        (Prompt, {"id": "p", "family": "p", "text": ""}),
        (Prompt, {"id": "", "family": "p", "text": "x"}),
        (Prompt, {"id": "a b", "family": "p", "text": "x"}),
        (Prompt, {"id": "a" * 65, "family": "p", "text": "x"}),
        (Prompt, {"id": "a\n", "family": "p", "text": "x"}),
        (Prompt, {"id": "é", "family": "p", "text": "x"}),
        (Usage, {"input_tokens": -1}),
        (Usage, {"output_tokens": 1.5}),
        (Reply, {"text": "x", "stop": "end_turn", "model": "m"}),
        (Reply, {"text": "x", "stop": "end", "model": "m", "seconds": -1}),
        (DimensionScore, {"score": 10.1, "rationale": "r"}),
        (DimensionScore, {"score": -0.1, "rationale": "r"}),
        (DimensionScore, {"score": float("nan"), "rationale": "r"}),
        (TeacherTerms, {"teacher": "t", "licence": "MIT"}),
    ],
)
def test_what_cannot_be_is_refused(record: type[Record], values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        record.model_validate(values)


@pytest.mark.parametrize(
    "changes", [{"sample": -1}, {"temperature": -0.1}, {"temperature": float("nan")}, {"temperature": float("inf")}]
)
def test_a_draw_that_cannot_be_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        request(**changes)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_token_limit_is_positive(limit: int) -> None:
    with pytest.raises(ValidationError):
        request(max_tokens=limit)
    with pytest.raises(ValidationError):
        generation(max_tokens=limit)


# Identities.


def test_a_content_hash_is_the_sha256_of_canonical_json() -> None:
    # printf '{"a":[1,null,"\u00e9"],"b":true}' | sha256sum
    assert content_hash({"b": True, "a": [1, None, "é"]}) == (
        "2572338816e46a5309b9098dfd01294b9e5f41aea805ed9b1295a938ed637ea8"
    )
    assert content_hash("") == "12ae32cb1ec02d01eda3581b127c1fee3b0dc53572ed6baf239721a03d82e126"


@given(st.dictionaries(TEXT, JSON, max_size=4))
@examples(max_examples=50)
def test_the_order_of_keys_does_not_count(value: dict[str, Any]) -> None:
    assert content_hash(value) == content_hash(dict(reversed(value.items())))


def test_different_values_have_different_hashes() -> None:
    values: list[Any] = [None, 0, False, "", "0", [], {}, [[]], [0], ["0"], "null", {"a": None}, 0.5, "é", "e\u0301"]
    assert len({content_hash(value) for value in values}) == len(values)


def test_a_hash_is_the_same_in_another_process() -> None:
    source = "from mlx_distill.records import content_hash; print(content_hash({'é': [1, 2.5, None], 'a': 'b'}))"
    out = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True).stdout
    assert out.strip() == content_hash({"a": "b", "é": [1, 2.5, None]})


def test_a_request_is_known_by_what_decides_its_answer() -> None:
    first = request()
    assert request(prompt_id="other", family="other").key == first.key
    others = [
        request(teacher="anthropic:n"),
        request(system=""),
        request(system="Be brief."),
        request(max_tokens=101),
        request(messages=(Message(role="user", content="Hi "),)),
        request(messages=(Message(role="assistant", content="Hi"),)),
        request(messages=(Message(role="user", content="Hi", name="n"),)),
        request(messages=(Message(role="user", content="Hi"), Message(role="assistant", content="Hi"))),
        # Not to be confused with a system text that says the same.
        request(messages=(Message(role="system", content="Be brief."), Message(role="user", content="Hi"))),
        request(sample=1),
        request(sample=2),
        request(temperature=0.0),
        request(temperature=1.0),
        request(sample=1, temperature=1.0),
    ]
    assert len({first.key, *(other.key for other in others)}) == 1 + len(others)


def test_what_was_asked_before_there_were_samples_is_known_by_the_same_key() -> None:
    """Written down when a request had neither sample nor temperature: ledgers hold paid answers under such keys."""
    old = "5b865b1291fdcce6ab03d5cd6e045a9392b9012db08df9ffdda689766ea7e129"
    assert request().key == request(sample=0, temperature=None).key == old


def test_a_token_limit_is_no_part_of_how_an_answer_is_drawn() -> None:
    first = request(sample=1, temperature=1.0)
    assert request(sample=1, temperature=1.0, max_tokens=200, prompt_id="q").draw_key == first.draw_key
    others = [
        request(sample=2, temperature=1.0),
        request(sample=1, temperature=0.5),
        request(sample=1, temperature=1.0, teacher="anthropic:n"),
        request(sample=1, temperature=1.0, system="S"),
        request(sample=1, temperature=1.0, messages=(Message(role="user", content="Hi "),)),
    ]
    assert len({first.draw_key, *(other.draw_key for other in others)}) == 1 + len(others)


# What records say of themselves.


@pytest.mark.parametrize("stop", get_args(StopReason))
def test_only_an_answer_that_ended_by_itself_is_finished(stop: StopReason) -> None:
    assert generation(stop=stop).finished == (stop == "end")


def test_a_verdict_is_tied_to_the_text() -> None:
    assert generation(text="a").answer_sha256 == generation(text="a", seconds=9, contender="teacher").answer_sha256
    assert generation(text="a").answer_sha256 != generation(text="a ").answer_sha256


def test_the_overall_score_is_the_mean_and_missing_is_not_zero() -> None:
    def verdict(*scores: float) -> Verdict:
        named = {str(n): DimensionScore(score=score, rationale="r") for n, score in enumerate(scores)}
        return Verdict(prompt_id="p", contender="base", judge="rubric", answer_sha256="0", scores=named)

    assert verdict(1, 2, 6).overall == 3.0
    assert verdict(0).overall == 0.0
    assert verdict().overall is None
