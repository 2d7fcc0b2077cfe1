"""Splits go by family and never move; what is left out is counted; rows are what was answered."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distill.collect.splits import SPLITS, refuse_foreign, split_of, write_data_set
from mlx_distill.errors import ConfigError, FolderError, TeacherError
from mlx_distill.layout import DataFolder, file_sha256, read_record, read_rows
from mlx_distill.ledger import Ledger
from mlx_distill.manifest import Manifest, TeacherTerms
from mlx_distill.prompts import load_prompts
from mlx_distill.records import ChatRow, Message, Reply, Request, StopReason, Usage

TERMS = TeacherTerms(teacher="t", licence="MIT", summary="free")

#: Families whose split, with a tenth each for valid and test, is known: a change of these moves every data set.
KNOWN = {"family-0": "test", "family-11": "valid", "family-1": "train"}


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    return DataFolder(tmp_path)


@pytest.fixture
def ledger(folder: DataFolder) -> Iterator[Ledger]:
    with Ledger(folder.ledger) as opened:
        yield opened


def request_for(n: int, family: str, *, system: str | None = None) -> Request:
    return Request(
        prompt_id=f"p{n}",
        family=family,
        teacher="t",
        messages=(Message(role="user", content=f"question {n}"),),
        system=system,
        max_tokens=9,
    )


def answer(ledger: Ledger, request: Request, text: str, stop: StopReason = "end", cost: float | None = 0.5) -> None:
    ledger.plan([request])
    ledger.mark_sent(request.key)
    reply = Reply(text=text, stop=stop, model="m-1", usage=Usage(input_tokens=2, output_tokens=3), seconds=1.5)
    ledger.record_reply(request.key, reply, cost_usd=cost, prices_dated="2026-11-01")


def write(
    folder: DataFolder, ledger: Ledger, requests: list[Request], valid: float = 0.1, test: float = 0.1
) -> Manifest:
    return write_data_set(folder, ledger, requests, teacher="t", terms=TERMS, valid_fraction=valid, test_fraction=test)


def test_the_split_of_a_family_is_fixed_for_good() -> None:
    assert {family: split_of(family, valid_fraction=0.1, test_fraction=0.1) for family in KNOWN} == KNOWN


def test_fractions_are_met_on_average() -> None:
    counts = Counter(split_of(f"family-{n}", valid_fraction=0.1, test_fraction=0.2) for n in range(10_000))
    assert abs(counts["test"] - 2000) < 150
    assert abs(counts["valid"] - 1000) < 120


def test_the_shipped_prompts_fill_every_split() -> None:
    families = {p.family for p in load_prompts(Path("data/prompts/coding.toml"))}
    counts = Counter(split_of(family, valid_fraction=0.1, test_fraction=0.1) for family in families)
    assert min(counts[split] for split in SPLITS) >= 2


def test_rows_are_in_prompt_order_and_hold_messages_alone(folder: DataFolder, ledger: Ledger) -> None:
    requests = [request_for(n, "family-1", system="S" if n == 1 else None) for n in range(3)]
    for request in reversed(requests):
        answer(ledger, request, f"answer to {request.prompt_id}\u2028\x85 \U0001f600")
    write(folder, ledger, requests)
    lines = folder.split("train").read_bytes().decode().removesuffix("\n").split("\n")
    assert [json.loads(line) for line in lines] == [
        {
            "messages": [
                *([{"role": "system", "content": "S"}] if n == 1 else []),
                {"role": "user", "content": f"question {n}"},
                {"role": "assistant", "content": f"answer to p{n}\u2028\x85 \U0001f600"},
            ]
        }
        for n in range(3)
    ]


def test_what_is_not_a_finished_answer_is_left_out_and_counted(folder: DataFolder, ledger: Ledger) -> None:
    requests = [request_for(n, "family-1") for n in range(9)]
    answer(ledger, requests[0], "good")
    answer(ledger, requests[1], "cut", "length")
    answer(ledger, requests[2], "cut", "context")
    answer(ledger, requests[3], "cut", "other")
    answer(ledger, requests[4], "no", "refusal")
    answer(ledger, requests[5], " \n ")
    ledger.plan(requests)
    ledger.mark_sent(requests[7].key)
    ledger.record_failure(requests[7].key, "broken")
    ledger.mark_sent(requests[8].key)
    manifest = write(folder, ledger, requests)
    assert {drop.reason: drop.prompt_ids for drop in manifest.dropped} == {
        "empty": ("p5",),
        "failed": ("p7", "p8"),
        "refused": ("p4",),
        "truncated": ("p1", "p2", "p3"),
        "unsent": ("p6",),
    }
    assert all(drop.count == len(drop.prompt_ids) for drop in manifest.dropped)
    assert (manifest.prompts, manifest.answered, manifest.rows["train"]) == (9, 2, 1)
    assert (manifest.usage.input_tokens, manifest.usage.output_tokens) == (12, 18)
    assert (manifest.cost_usd, manifest.prices_dated, manifest.collection_seconds) == (3.0, "2026-11-01", 9.0)


def test_the_manifest_tells_the_truth_about_the_files(folder: DataFolder, ledger: Ledger) -> None:
    requests = [request_for(n, family) for n, family in enumerate([*KNOWN, *KNOWN])]
    for request in requests:
        answer(ledger, request, "a")
    manifest = write(folder, ledger, requests)
    assert manifest.rows == {"train": 2, "valid": 2, "test": 2}
    assert manifest.families == {"train": 1, "valid": 1, "test": 1}
    for split in SPLITS:
        assert len(read_rows(folder.split(split), ChatRow)) == manifest.rows[split]
        assert file_sha256(folder.split(split)) == manifest.sha256[split]
    assert read_record(folder.manifest, Manifest) == manifest


def test_other_requests_in_the_ledger_stay_out(folder: DataFolder, ledger: Ledger) -> None:
    old, new = request_for(0, "family-1"), request_for(1, "family-1")
    answer(ledger, old, "old")
    answer(ledger, new, "new", cost=0.25)
    manifest = write(folder, ledger, [new])
    assert (manifest.rows["train"], manifest.cost_usd) == (1, 0.25)
    assert len(list(ledger.entries())) == 2


def test_an_empty_split_has_no_file_also_where_there_was_one(folder: DataFolder, ledger: Ledger) -> None:
    requests = [request_for(n, family) for n, family in enumerate(KNOWN)]
    for request in requests:
        answer(ledger, request, "a")
    write(folder, ledger, requests)
    assert folder.split("valid").exists()
    manifest = write(folder, ledger, requests, valid=0, test=0)
    assert manifest.rows == {"train": 3, "valid": 0, "test": 0}
    assert not folder.split("valid").exists()
    assert manifest.sha256.keys() == {"train"}


def test_nothing_to_train_on_leaves_what_was_there(folder: DataFolder, ledger: Ledger) -> None:
    good, cut, held = request_for(0, "family-1"), request_for(1, "family-1"), request_for(2, "family-0")
    answer(ledger, good, "a")
    answer(ledger, cut, "b", "length")
    answer(ledger, held, "c")
    write(folder, ledger, [good])
    before = {path.name: path.read_bytes() for path in folder.root.iterdir() if "json" in path.name}
    with pytest.raises(TeacherError, match=r"1 truncated[^\n]*\n.*--max-tokens-ceiling"):
        write(folder, ledger, [cut])
    with pytest.raises(ConfigError, match="--test-fraction 0"):
        write(folder, ledger, [held])
    assert {path.name: path.read_bytes() for path in folder.root.iterdir() if "json" in path.name} == before


def test_writing_again_changes_nothing(folder: DataFolder, ledger: Ledger) -> None:
    request = request_for(0, "family-1")
    answer(ledger, request, "a")
    first = write(folder, ledger, [request]).model_copy(update={"created": "2020-01-01T00:00:00+00:00"})
    folder.manifest.write_text(first.to_json(), encoding="utf-8")
    assert write(folder, ledger, [request]) == first
    assert read_record(folder.manifest, Manifest) == first


def test_a_users_own_rows_are_not_overwritten(folder: DataFolder) -> None:
    folder.split("train").write_text("{}\n", encoding="utf-8")
    with pytest.raises(FolderError, match=r"train\.jsonl"):
        refuse_foreign(folder)


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@settings(deadline=None, max_examples=25)
@given(st.lists(names, min_size=1, max_size=20), st.lists(names, max_size=20))
def test_adding_prompts_moves_no_row(before: list[str], added: list[str]) -> None:
    def rows_of(families: list[str]) -> dict[str, str]:
        requests = [request_for(n, family) for n, family in enumerate(families)]
        with tempfile.TemporaryDirectory() as root, Ledger(Path(":memory:")) as ledger:
            for request in requests:
                answer(ledger, request, "a")
            folder = DataFolder(Path(root))
            try:
                write(folder, ledger, requests, valid=0.3, test=0.3)
            except ConfigError:  # None in train: the split is what it is, and no row may move to mend it.
                return {}
            return {
                row.messages[0].content or "": split
                for split in SPLITS
                for row in read_rows(folder.split(split), ChatRow)
            }

    small, large = rows_of(before), rows_of([*before, *added])
    assert small.items() <= large.items()
    splits_of_families: dict[str, set[str]] = {}
    for n, family in enumerate([*before, *added]):
        if large:
            splits_of_families.setdefault(family, set()).add(large[f"question {n}"])
    assert all(len(splits) == 1 for splits in splits_of_families.values())
