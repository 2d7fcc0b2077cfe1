"""What answers cost: averages that leave nothing out which is paid for, and prices that are never guessed."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distill.averages import Averages, measure_comparison, measure_data, measure_ledger
from mlx_distill.config import CostConfig
from mlx_distill.cost import cost, cost_rows
from mlx_distill.errors import ConfigError, InputError
from mlx_distill.layout import ComparisonFolder, DataFolder, append_row, write_text
from mlx_distill.ledger import Ledger
from mlx_distill.manifest import DropCount, Manifest, TeacherTerms
from mlx_distill.pricing import Price, listed_prices, price_of
from mlx_distill.records import ComparisonRecord, Generation, Message, Prompt, Reply, Request, StopReason, Usage

SONNET = "anthropic:claude-sonnet-4-6"
LOCAL = "mlx:Qwen/Qwen2.5-7B-Instruct"


def request_to(teacher: str, number: int, max_tokens: int = 100) -> Request:
    message = Message(role="user", content=f"question {number}")
    return Request(prompt_id=f"p{number}", family="f", teacher=teacher, messages=(message,), max_tokens=max_tokens)


def reply_of(tokens: tuple[int, int], stop: StopReason = "end", seconds: float = 0.0) -> Reply:
    usage = Usage(input_tokens=tokens[0], output_tokens=tokens[1])
    return Reply(text="x", stop=stop, usage=usage, model="m", seconds=seconds)


def fill(path: Path, replies: Sequence[Reply], *, teacher: str = SONNET, sendings: int = 1) -> None:
    """Enter a reply a prompt."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Ledger(path) as ledger:
        for number, reply in enumerate(replies):
            request = request_to(teacher, number)
            ledger.plan([request])
            for _ in range(sendings - 1):
                ledger.mark_sent(request.key)
                ledger.record_failure(request.key, "no")
            ledger.mark_sent(request.key)
            ledger.record_reply(request.key, reply)


def times(path: Path, spans: Sequence[tuple[str, str]]) -> None:
    """Say when the requests were sent and answered: minute and second of one hour."""
    with sqlite3.connect(path) as db:
        for number, span in enumerate(spans, start=1):
            db.execute(
                "UPDATE requests SET sent_at = ?, done_at = ? WHERE rowid = ?",
                (*(f"2026-01-01T10:{at}.000+00:00" for at in span), number),
            )
    db.close()


# Averages


def test_what_was_cut_or_refused_on_the_way_is_in_the_average(tmp_path: Path) -> None:
    ends: tuple[StopReason, ...] = ("end", "end", "length", "refusal")
    tokens = [(10, 100), (30, 300), (10, 100), (10, 20)]
    fill(tmp_path / "ledger.db", [reply_of(t, stop) for t, stop in zip(tokens, ends, strict=True)], sendings=3)
    found = measure_data(tmp_path)
    assert (found.input_tokens, found.output_tokens) == (60 / 2, 520 / 2)
    assert (found.answers, found.replies, found.cut, found.refused, found.repeated) == (2, 4, 1, 1, 8)
    assert (found.teacher, found.counted, found.seconds) == (SONNET, "replies", None)


@settings(deadline=None, max_examples=30)
@given(
    replies=st.lists(
        st.tuples(st.integers(1, 10**4), st.integers(0, 10**5), st.sampled_from(["end", "length", "refusal"])),
        min_size=1,
        max_size=12,
    )
)
def test_a_collection_scaled_to_its_own_answers_costs_what_it_cost(
    replies: list[tuple[int, int, StopReason]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    fill(path, [reply_of((into, out), stop) for into, out, stop in replies])
    found = measure_ledger(path)
    answers = sum(stop == "end" for *_, stop in replies)
    if not answers:
        assert found is None
        return
    assert found is not None
    paid = Usage(input_tokens=sum(r[0] for r in replies), output_tokens=sum(r[1] for r in replies))
    price = Price(3, 15)
    assert found.dollars(price, answers) == pytest.approx(price.cost(paid), rel=1e-12)
    assert found.dollars(price, answers, batch=True) == pytest.approx(price.cost(paid, batch=True), rel=1e-12)


def test_time_goes_by_how_many_were_under_way(tmp_path: Path) -> None:
    """Two at once for ten seconds, nothing for a minute, then one alone for twenty."""
    path = tmp_path / "ledger.db"
    fill(path, [reply_of((1, 1), seconds=s) for s in (10.0, 10.0, 20.0)])
    times(path, [("00:00", "00:10"), ("00:00", "00:10"), ("01:10", "01:30")])
    found = measure_data(tmp_path)
    assert found.seconds == pytest.approx(40 / 3)
    assert found.under_way == pytest.approx(40 / 30)
    assert found.seconds_for(3) == pytest.approx(30)
    assert found.seconds_for(3, concurrency=4) == pytest.approx(10)


def test_overlaps_are_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    fill(path, [reply_of((1, 1), seconds=1.0)] * 4)
    # The second lies within the first; the third begins in it; the fourth ends before it began, as clocks may say.
    times(path, [("00:00", "00:20"), ("00:05", "00:10"), ("00:15", "00:35"), ("00:50", "00:40")])
    assert measure_data(tmp_path).under_way == pytest.approx(45 / 35)


def test_the_time_of_batches_is_not_a_requests_time(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    fill(path, [reply_of((1, 1), seconds=5.0), reply_of((1, 1), seconds=9999.0)])
    with sqlite3.connect(path) as db:
        db.execute("UPDATE requests SET batch = 1 WHERE rowid = 2")
    db.close()
    found = measure_data(tmp_path)
    assert (found.answers, found.seconds) == (2, 5.0)


def test_of_several_teachers_one_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    fill(path, [reply_of((1, 10))] * 3)
    fill(path, [reply_of((2, 50))] * 2, teacher=f"{LOCAL}@abc123")
    fill(path, [reply_of((2, 70), "length")] * 9, teacher="anthropic:all-cut")
    assert measure_data(tmp_path).teacher == SONNET
    assert measure_data(tmp_path, ["anthropic:all-cut", LOCAL]).output_tokens == 50
    assert measure_data(tmp_path, ["anthropic:other"]).output_tokens == 10


def test_a_ledger_that_is_measured_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    fill(path, [reply_of((1, 10))])
    before = path.read_bytes()
    measure_data(tmp_path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["ledger.db"]


def manifest(**facts: object) -> Manifest:
    values: dict[str, object] = {
        "name": "n",
        "created": "2026-01-01T00:00:00+00:00",
        "teacher": SONNET,
        "terms": TeacherTerms(teacher=SONNET, licence="x", summary="x"),
        "prompts": 12,
        "answered": 10,
        "rows": {},
        "families": {},
        "sha256": {},
        "usage": Usage(input_tokens=500, output_tokens=9000),
        "collection_seconds": 80.0,
        "asked_again": 2,
        "refusals": {"none given": 1},
        "dropped": (DropCount(reason="truncated", count=1), DropCount(reason="duplicate", count=4)),
    }
    return Manifest.model_validate(values | facts)


def test_a_data_set_without_its_ledger_is_measured_by_its_manifest(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path)
    write_text(folder.manifest, manifest().to_json())
    found = measure_data(tmp_path)
    assert (found.input_tokens, found.output_tokens, found.answers) == (50, 900, 10)
    assert (found.replies, found.cut, found.refused, found.repeated) == (14, 3, 1, None)
    assert (found.seconds, found.under_way) == (8.0, None)
    write_text(folder.manifest, manifest(batch_answers=1).to_json())
    assert measure_data(tmp_path).seconds is None


def test_answers_that_nobody_counted_are_refused_with_the_way_out(tmp_path: Path) -> None:
    for name, replies in (("empty", []), ("recorded", [reply_of((0, 0))]), ("cut", [reply_of((5, 100), "length")])):
        fill(tmp_path / name / "ledger.db", replies)
        with pytest.raises(InputError, match="no whole answer whose tokens were counted") as caught:
            measure_data(tmp_path / name)
        assert "--input-tokens N --output-tokens N" in str(caught.value.hint)


def test_a_folder_that_holds_nothing_of_the_kind_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a ledger nor a manifest"):
        measure_data(tmp_path)
    with pytest.raises(InputError, match="no comparison"):
        measure_comparison(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "ledger.db").write_text("not a database, however long it is" * 100)
    with pytest.raises(InputError, match="not a ledger"):
        measure_data(tmp_path)


def show(folder: ComparisonFolder, number: int, tokens: int, *, contender: str = "teacher", cut: bool = False) -> None:
    append_row(
        folder.generations,
        Generation(
            prompt=Prompt(id=f"p{number}", family="f", text="t"),
            contender=contender,
            model="m",
            text="x",
            stop="length" if cut else "end",
            output_tokens=tokens,
            seconds=6.0,
            max_tokens=1000,
        ),
    )


def test_a_comparison_is_measured_by_the_best_count_it_has(tmp_path: Path) -> None:
    folder = ComparisonFolder(tmp_path)
    show(folder, 1, 7, contender="base")
    with pytest.raises(InputError, match="no whole answer of a teacher"):
        measure_comparison(tmp_path)
    show(folder, 1, 999)
    show(folder, 1, 300)  # Answered again: the latest counts.
    show(folder, 2, 100, cut=True)
    record = ComparisonRecord(
        name="c",
        run=str(tmp_path / "nowhere"),
        created="2026-01-01T00:00:00+00:00",
        teacher=SONNET,
        models={"teacher": "m"},
        prompts_sha256="0",
        max_tokens=1000,
        device="cpu",
        seconds={"teacher": 4.0},
    )
    write_text(folder.record, record.to_json())
    found = measure_comparison(tmp_path)
    assert (found.input_tokens, found.output_tokens, found.counted) == (None, 400, "shown")
    assert (found.answers, found.replies, found.cut, found.teacher) == (1, 2, 1, SONNET)
    assert found.seconds_for(1) == pytest.approx(12 / 3)
    fill(folder.teacher_ledger, [reply_of((11, 22))])
    assert (measure_comparison(tmp_path).input_tokens, measure_comparison(tmp_path).output_tokens) == (11, 22)


# Scaling


def test_a_price_that_is_not_listed_is_not_zero_and_a_local_model_is_time() -> None:
    averages = Averages(50, 1000, "replies", answers=10, teacher=LOCAL, seconds=4.0, under_way=8.0)
    listed, local, unknown = cost_rows(averages, [SONNET, LOCAL, "openai:gpt"], [1000])
    assert (listed.price, listed.online, listed.batch, listed.seconds) == ("listed", 15.15, 7.575, None)
    assert (local.price, local.online, local.batch, local.seconds) == ("none", 0.0, None, 500.0)
    assert (unknown.price, unknown.online, unknown.batch, unknown.seconds) == ("unknown", None, None, None)


def test_without_a_name_all_listed_models_are_told_dearest_first_and_the_measured_one_before(tmp_path: Path) -> None:
    by_hand = cost(CostConfig(input_tokens=50, output_tokens=1000))
    assert {spec.partition(":")[2] for spec in by_hand.teachers} == listed_prices().keys()
    costs = [row.online for row in by_hand.rows if row.prompts == 1_000_000]
    assert costs == sorted(costs, key=lambda c: c or 0, reverse=True)
    fill(tmp_path / "ledger.db", [reply_of((50, 1000), seconds=3.0)], teacher=f"{LOCAL}@abc")
    assert cost(CostConfig(data=tmp_path)).teachers == (LOCAL, *by_hand.teachers)
    fill(tmp_path / "paid" / "ledger.db", [reply_of((50, 1000))])
    assert cost(CostConfig(data=tmp_path / "paid")).teachers == by_hand.teachers


def test_the_collection_that_the_project_began_with() -> None:
    """104 prompts to Sonnet came to $1.61; ten thousand of the kind, in batches, to half of a hundred times that."""
    found = cost(CostConfig(input_tokens=45, output_tokens=1024, teacher=SONNET, prompts="10400,104,104"))
    small, large = found.rows
    assert (small.prompts, round(small.online or 0, 2)) == (104, 1.61)
    assert large.batch == pytest.approx(50 * (small.online or 0))


@pytest.mark.parametrize("spec", ["claude-sonnet-4-6", "anthropic:", "antropic:claude-sonnet-4-6", ":", "x", "mlx: "])
def test_a_teacher_that_is_none_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="unknown teacher") as caught:
        cost(CostConfig(input_tokens=1, output_tokens=1, teacher=f"{SONNET},{spec}"))
    if "sonnet" in spec:
        assert f"Did you mean {SONNET}?" in caught.value.message


@pytest.mark.parametrize("prompts", ["", "0", "-1", "1.5", "1e6", "10,,20", "ten", "٣", "9" * 400, "1000 000"])
def test_a_number_of_prompts_that_is_none_is_refused(prompts: str) -> None:
    with pytest.raises(ConfigError, match="not a whole number above 0"):
        cost(CostConfig(input_tokens=1, output_tokens=1, prompts=prompts))


def test_every_listed_price_is_found_by_its_spec() -> None:
    assert all(price_of(f"anthropic:{name}") == price for name, price in listed_prices().items())
