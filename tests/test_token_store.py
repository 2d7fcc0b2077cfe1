"""Stores of tokens: what is written is what is read, and nothing that was damaged is believed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_distill.batches import TokenRow
from mlx_distill.token_store import (
    FILES,
    HEADER,
    StoredRows,
    StoreError,
    StoreHeader,
    StoreWriter,
    TokenStore,
    TokenType,
    map_store,
    memory_files,
    open_store,
    store_files,
)

KEY = "0123456789abcdef"

Plain = tuple[list[int], list[bool]]


def token_rows(highest: int) -> st.SearchStrategy[list[Plain]]:
    """Rows of any length, none too."""
    pairs = st.lists(st.tuples(st.integers(0, highest), st.booleans()), max_size=40)
    return st.lists(pairs.map(lambda row: ([t for t, _ in row], [m for _, m in row])), max_size=12)


def put(files: Mapping[str, BinaryIO], rows: list[Plain], dtype: TokenType = "<u2") -> StoreHeader:
    writer = StoreWriter(files, dtype)
    for at, (tokens, mask) in enumerate(rows):
        writer.add(3 * at + 1, TokenRow(np.array(tokens, dtype=np.int32), np.array(mask, dtype=np.bool_)))
    return writer.finish(key=KEY)


def save(folder: Path, rows: list[Plain], dtype: TokenType = "<u2") -> Path:
    folder.mkdir()
    with store_files(folder) as files:
        header = put(files, rows, dtype)
    (folder / HEADER).write_text(header.to_json() + "\n", encoding="utf-8")
    return folder


def plain(store: TokenStore) -> list[Plain]:
    return [(row.tokens.tolist(), row.loss_mask.tolist()) for row in StoredRows(store, np.arange(len(store)))]


SOME: list[Plain] = [([1, 2, 3], [False, True, True]), ([60_000] * 20, [False] * 10 + [True] * 10), ([7], [False])]


# What is written is what is read


@pytest.mark.parametrize(("dtype", "highest"), [("<u2", 2**16 - 1), ("<i4", 2**31 - 1)])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_come_back_as_they_were(tmp_path: Path, dtype: TokenType, highest: int, data: st.DataObject) -> None:
    rows = data.draw(token_rows(highest))
    shutil.rmtree(tmp_path / "store", ignore_errors=True)
    on_disk = open_store(save(tmp_path / "store", rows, dtype), key=KEY)
    files = memory_files()
    in_memory = map_store(files, put(files, rows, dtype))
    for store in (on_disk, in_memory):
        assert plain(store) == rows
        assert store.lengths.tolist() == [len(tokens) for tokens, _ in rows]
        assert store.index["target_tokens"].tolist() == [sum(mask) for _, mask in rows]
        assert store.index["line"].tolist() == [3 * at + 1 for at in range(len(rows))]


def test_rows_are_copies_and_can_be_chosen(tmp_path: Path) -> None:
    store = open_store(save(tmp_path / "store", SOME), key=KEY)
    rows = StoredRows(store, np.array([2, 0]))
    assert [row.tokens.tolist() for row in rows] == [[7], [1, 2, 3]]
    assert [row.tokens.tolist() for row in rows[1:]] == [[1, 2, 3]]
    assert rows[-1].tokens.tolist() == [1, 2, 3]
    assert (rows[0].tokens.dtype, rows[0].loss_mask.dtype) == (np.int32, np.bool_)
    with pytest.raises(IndexError):
        rows[2]
    first = rows[1]
    first.tokens[:] = 9
    first.loss_mask[:] = False
    assert plain(store) == SOME


def test_a_store_takes_two_bytes_and_a_bit_for_a_token(tmp_path: Path) -> None:
    folder = save(tmp_path / "store", [([1] * 800, [True] * 800)] * 5)
    assert {name: (folder / name).stat().st_size for name in FILES} == {
        "tokens.bin": 2 * 4000,
        "mask.bin": 4000 // 8,
        "index.bin": 5 * 16,
    }


def test_a_removed_store_stays_readable_where_it_is_open(tmp_path: Path) -> None:
    store = open_store(save(tmp_path / "store", SOME), key=KEY)
    shutil.rmtree(tmp_path / "store")
    assert plain(store) == SOME


# What was damaged is not believed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(tmp_path / "store", SOME)


def refused(folder: Path) -> str:
    with pytest.raises(StoreError) as caught:
        open_store(folder, key=KEY)
    return str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_byte_is_found_out(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for size in range(len(content)):
        (folder / name).write_bytes(content[:size])
        assert f"{name} has {size} bytes instead of {len(content)}" in refused(folder)
    (folder / name).write_bytes(content + b"\0")
    refused(folder)
    (folder / name).write_bytes(content)
    assert plain(open_store(folder, key=KEY)) == SOME


@pytest.mark.parametrize("name", FILES)
def test_any_changed_byte_is_found_out(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for at in range(len(content)):
        (folder / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert f"{name} was changed" in refused(folder)


def test_a_header_cut_or_changed_at_any_byte_is_found_out(folder: Path) -> None:
    header = folder / HEADER
    content = header.read_bytes()
    for at in range(len(content) - 1):  # The last is a line feed.
        header.write_bytes(content[:at])
        refused(folder)
        header.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        refused(folder)
    header.write_bytes(content)
    assert plain(open_store(folder, key=KEY)) == SOME


def test_a_header_of_another_store_is_found_out(folder: Path, tmp_path: Path) -> None:
    other = save(tmp_path / "other", SOME[:2])
    shutil.copyfile(other / HEADER, folder / HEADER)
    refused(folder)
    with pytest.raises(StoreError, match="made from something else"):
        open_store(other, key="f" * 16)


def counts_are_wrong(header: StoreHeader) -> StoreHeader:
    return header.model_copy(update={"target_tokens": header.target_tokens + 1})


def tokens_are_wider(header: StoreHeader) -> StoreHeader:
    return header.model_copy(update={"dtype": "<i4"})


def a_file_is_missing(header: StoreHeader) -> StoreHeader:
    return header.model_copy(update={"files": {name: header.files[name] for name in FILES[:2]}})


@pytest.mark.parametrize("change", [counts_are_wrong, tokens_are_wider, a_file_is_missing])
def test_a_header_that_contradicts_the_files_is_found_out(
    folder: Path, change: Callable[[StoreHeader], StoreHeader]
) -> None:
    header = StoreHeader.model_validate_json((folder / HEADER).read_bytes())
    (folder / HEADER).write_text(change(header).to_json(), encoding="utf-8")
    refused(folder)


@pytest.mark.parametrize("name", [HEADER, *FILES])
def test_a_folder_in_the_place_of_a_file_is_found_out(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).mkdir()
    refused(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found_out(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder)


def test_no_store_is_no_damage(folder: Path, tmp_path: Path) -> None:
    (folder / HEADER).unlink()
    for nothing in (folder, tmp_path / "none", tmp_path / "none" / "deeper"):
        with pytest.raises(FileNotFoundError):
            open_store(nothing, key=KEY)
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError):
        open_store(tmp_path / "file", key=KEY)
