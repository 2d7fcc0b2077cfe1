"""The cache of tokens: made once, believed only when whole, never in the way of training, never too large."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_distill import layout, token_cache
from mlx_distill.dataset import load_splits
from mlx_distill.errors import InputError
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.progress import Bar, Progress
from mlx_distill.token_cache import TokenCache, token_folder
from mlx_distill.token_store import FILES, HEADER, StoredRows, TokenStore
from tests.tiny import CHAT_TEMPLATE, make_tiny_model

Plain = list[tuple[int, list[int], list[bool]]]


class Watcher(Progress):
    """Keeps what was said and begun, and does something at a line of the file; at line 0, before it is read."""

    def __init__(self, at: int | None = None, action: Callable[[], object] = lambda: None) -> None:
        self.said: list[str] = []
        self.tasks: list[str] = []
        self._at, self._action = at, action

    def say(self, line: str) -> None:
        self.said.append(line)

    @contextmanager
    def task(self, title: str, total: float | None = None, *, unit: str = "") -> Iterator[Bar]:
        self.tasks.append(title)
        watcher, done = self, 0
        if self._at == 0:
            self._action()

        class Counting(Bar):
            def advance(self, amount: float = 1, **fields: str) -> None:
                nonlocal done
                done += int(amount)
                if watcher._at is not None and done >= watcher._at:
                    watcher._at = None
                    watcher._action()

        yield Counting()
        assert done == total


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_DISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


def chat(number: int) -> dict[str, Any]:
    answer = "return first + second\n" * (1 + number % 4)
    return {"messages": [{"role": "user", "content": f"add {number}"}, {"role": "assistant", "content": answer}]}


def data(path: Path, first: int = 0, *, rows: int = 12) -> Path:
    path.write_text("".join(json.dumps(chat(first + at)) + "\n" for at in range(rows)), encoding="utf-8")
    return path


def load(path: Path, tokenizer: Any, progress: Progress | None = None) -> TokenStore:
    return TokenCache(tokenizer, progress=progress or Watcher(), small=0).load(path).store


def plain(store: TokenStore) -> Plain:
    rows = StoredRows(store, range(len(store)))  # type: ignore[arg-type]
    lines = store.index["line"].tolist()
    return [(line, r.tokens.tolist(), r.loss_mask.tolist()) for line, r in zip(lines, rows, strict=True)]


def direct(path: Path, tokenizer: Any) -> Plain:
    """Tokenised into memory, with no file at all."""
    return plain(TokenCache(tokenizer, small=1 << 40).load(path).store)


def stores() -> list[Path]:
    return sorted(path.parent for path in token_folder().rglob(HEADER))


def leftovers() -> list[Path]:
    return [path for path in token_folder().rglob("*") if ".part-" in path.name or ".old-" in path.name]


# Made once

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ROWS = st.lists(
    TEXTS.map(lambda text: {"text": text})
    | st.tuples(TEXTS, TEXTS).map(lambda pair: {"prompt": pair[0], "completion": pair[1]}),
    min_size=1,
    max_size=8,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, gaps=st.lists(st.integers(0, 2), min_size=8, max_size=8))
def test_what_comes_out_of_the_cache_is_what_tokenising_gives(
    tmp_path: Path, tokenizer: Any, rows: list[dict[str, str]], gaps: list[int]
) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join("\n" * gap + json.dumps(row) for row, gap in zip(rows, gaps, strict=False)), "utf-8")
    expected = direct(path, tokenizer)
    assert plain(load(path, tokenizer)) == expected
    again = Watcher()
    assert plain(load(path, tokenizer, again)) == expected
    assert (again.tasks, again.said) == ([], [])


def test_small_files_are_not_kept(tmp_path: Path, tokenizer: Any) -> None:
    TokenCache(tokenizer).load(data(tmp_path / "train.jsonl"))
    assert not token_folder().exists()


def test_another_length_limit_needs_no_new_tokens(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TokenCache.__init__, "__kwdefaults__", {**TokenCache.__init__.__kwdefaults__, "small": 0})
    data(tmp_path / "train.jsonl")
    data(tmp_path / "valid.jsonl", 50)
    first = Watcher()
    whole = load_splits(tmp_path, tokenizer, max_length=1000, progress=first)
    assert first.tasks == ["Tokenising train.jsonl", "Tokenising valid.jsonl"]
    again = Watcher()
    limit = int(whole["train"].lengths.max()) - 1
    less = load_splits(tmp_path, tokenizer, max_length=limit, progress=again)
    assert again.tasks == []
    assert 0 < len(less["train"].skipped) < 12
    assert sorted([*less["train"].lines, *(row.line for row in less["train"].skipped)]) == list(range(1, 13))
    assert less["train"].lengths.max() <= limit


def test_another_file_or_tokenizer_has_tokens_of_its_own(tmp_path: Path, tiny_model: Path) -> None:
    path = data(tmp_path / "train.jsonl")
    variants = [load_tokenizer(tiny_model) for _ in range(2)]
    variants[1].chat_template = CHAT_TEMPLATE.replace("helpful", "terse")
    variants.append(load_tokenizer(make_tiny_model(tmp_path / "model", vocabulary=380)))
    for at, variant in enumerate(variants, start=1):
        assert plain(load(path, variant)) == direct(path, variant)
        assert len(stores()) == at
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("add 7", "add 8"), encoding="utf-8")
    assert plain(load(path, variants[0])) == direct(path, variants[0])
    assert len(stores()) == 4
    path.write_text(text, encoding="utf-8")
    again = Watcher()
    load(path.rename(tmp_path / "renamed.jsonl"), variants[0], again)
    assert (again.tasks, len(stores())) == ([], 4)


# Believed only when whole


@pytest.mark.parametrize("name", [HEADER, *FILES])
@pytest.mark.parametrize("damage", ["gone", "empty", "cut", "longer", "changed", "a folder"])
def test_a_damaged_store_is_made_anew_and_said(tmp_path: Path, tokenizer: Any, name: str, damage: str) -> None:
    path = data(tmp_path / "train.jsonl")
    expected = plain(load(path, tokenizer))
    (store,) = stores()
    content = (store / name).read_bytes()
    (store / name).unlink()
    if damage == "a folder":
        (store / name).mkdir()
    elif damage != "gone":
        half = len(content) // 2
        changed = content[:half] + bytes([content[half] ^ 64]) + content[half + 1 :]
        damages = {"empty": b"", "cut": content[:half], "longer": content + b"\0", "changed": changed}
        (store / name).write_bytes(damages[damage])
    watcher = Watcher()
    assert plain(load(path, tokenizer, watcher)) == expected
    assert watcher.tasks == ["Tokenising train.jsonl"]
    assert sum("not whole" in line for line in watcher.said) == (0 if (name, damage) == (HEADER, "gone") else 1)
    assert (stores(), leftovers()) == ([store], [])
    again = Watcher()
    assert plain(load(path, tokenizer, again)) == expected
    assert (again.tasks, again.said) == ([], [])


def test_the_store_of_another_file_is_not_believed(tmp_path: Path, tokenizer: Any) -> None:
    load(data(tmp_path / "one.jsonl"), tokenizer)
    (one,) = stores()
    load(data(tmp_path / "two.jsonl", 100), tokenizer)
    (two,) = set(stores()) - {one}
    shutil.rmtree(two)
    shutil.copytree(one, two)
    watcher = Watcher()
    assert plain(load(tmp_path / "two.jsonl", tokenizer, watcher)) == direct(tmp_path / "two.jsonl", tokenizer)
    assert "made from something else" in watcher.said[0]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    path = data(tmp_path / "train.jsonl")
    with pytest.raises(InputError, match=r"train\.jsonl: the file was changed while it was read"):
        load(path, tokenizer, Watcher(0, lambda: data(path, 100)))
    assert (stores(), leftovers()) == ([], [])


@pytest.mark.parametrize("small", [0, 1 << 40])
def test_a_bad_row_leaves_nothing(tmp_path: Path, tokenizer: Any, small: int) -> None:
    path = data(tmp_path / "train.jsonl")
    with path.open("a", encoding="utf-8") as file:
        file.write("\n{\n")
    for _ in range(2):
        with pytest.raises(InputError, match=r"train\.jsonl:14: not valid JSON"):
            TokenCache(tokenizer, small=small).load(path)
    assert (stores(), leftovers()) == ([], [])


def test_an_interruption_leaves_no_thread_and_no_half_store(tmp_path: Path, tokenizer: Any) -> None:
    path = data(tmp_path / "train.jsonl", rows=50)
    with pytest.raises(KeyboardInterrupt):
        load(path, tokenizer, Watcher(20, lambda: signal.raise_signal(signal.SIGINT)))
    assert (stores(), leftovers()) == ([], [])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tokenise")]
    assert plain(load(path, tokenizer)) == direct(path, tokenizer)


# Never in the way of training


def test_of_two_that_want_one_store_the_second_waits(tmp_path: Path, tokenizer: Any) -> None:
    path = data(tmp_path / "train.jsonl")
    expected = plain(load(path, tokenizer))
    (store,) = stores()
    aside = store.rename(tmp_path / "aside")
    waiting = threading.Event()

    class Waiter(Watcher):
        def say(self, line: str) -> None:
            super().say(line)
            waiting.set()

    waiter, found = Waiter(), list[Plain]()
    with layout.lock(store.parent):
        thread = threading.Thread(target=lambda: found.append(plain(load(path, tokenizer, waiter))))
        thread.start()
        assert waiting.wait(60)
        aside.rename(store)
    thread.join(60)
    assert found == [expected]
    assert (len(waiter.said), waiter.tasks) == (1, [])
    assert "Another process" in waiter.said[0]


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, tokenizer: Any, cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_folder.write_text("a file")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    path = data(tmp_path / "train.jsonl")
    watcher = Watcher()
    assert plain(load(path, tokenizer, watcher)) == direct(path, tokenizer)
    assert len(watcher.said) == 1
    assert "cannot be kept for the next run" in watcher.said[0]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_disk_too_small_is_known_before_tokenising(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = data(tmp_path / "train.jsonl")
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10, 10, 0))
    watcher = Watcher()
    assert plain(load(path, tokenizer, watcher)) == direct(path, tokenizer)
    assert "GB are free" in watcher.said[0]
    assert watcher.tasks == ["Tokenising train.jsonl"]


@pytest.mark.parametrize("room", [0, 100, 2000])
def test_where_nothing_can_be_written_tokens_go_into_memory(tmp_path: Path, tokenizer: Any, room: int) -> None:
    """The system refuses every file to grow past the limit, in the cache and in the folder for temporary files."""
    path = data(tmp_path / "train.jsonl", rows=200)
    expected = direct(path, tokenizer)
    watcher = Watcher()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        store = load(path, tokenizer, watcher)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert plain(store) == expected
    assert len(watcher.said) == 2
    assert "cannot be kept" in watcher.said[0]
    assert "into memory" in watcher.said[1]
    assert (stores(), leftovers()) == ([], [])
    assert plain(load(path, tokenizer)) == expected


# Never too large


def test_the_stores_used_longest_ago_make_room(tmp_path: Path, tokenizer: Any) -> None:
    paths = [data(tmp_path / f"{at}.jsonl", 100 * at) for at in range(4)]
    made = []
    for at, path in enumerate(paths[:3]):
        load(path, tokenizer)
        (new,) = set(stores()) - set(made)
        made.append(new)
        os.utime(new / HEADER, (1000 + at, 1000 + at))
    size = sum(file.stat().st_size for file in made[0].iterdir())
    load(paths[0], tokenizer)  # Used again: the second is now the oldest.
    cache = TokenCache(tokenizer, small=0, limit=int(3.5 * size))
    kept = cache.load(paths[3])
    cache.trim()
    assert len(stores()) == 3
    assert not made[1].exists()
    assert plain(kept.store) == direct(paths[3], tokenizer)


def test_what_is_in_use_stays_even_above_the_limit(tmp_path: Path, tokenizer: Any) -> None:
    old = load(data(tmp_path / "old.jsonl"), tokenizer)
    cache = TokenCache(tokenizer, small=0, limit=0)
    paths = [data(tmp_path / f"{at}.jsonl", 100 * at + 100) for at in range(2)]
    for path in paths:
        cache.load(path)
    cache.trim()
    assert len(stores()) == 2
    assert plain(old) == direct(tmp_path / "old.jsonl", tokenizer)  # Mapped: it outlives its files.
    again = Watcher()
    for path in paths:
        load(path, tokenizer, again)
    assert again.tasks == []


def test_what_the_dead_left_is_cleaned_up_and_what_the_living_write_is_not(tmp_path: Path, tokenizer: Any) -> None:
    dead, living = (token_folder() / shelf / ".0123.part-abcdefgh" for shelf in ("0x", "1x"))
    torn = token_folder() / "2x" / "0123"
    for folder in (dead, living, torn):
        folder.mkdir(parents=True)
        (folder / "tokens.bin").write_bytes(b"x")
    cache = TokenCache(tokenizer, small=0, limit=0)
    cache.load(data(tmp_path / "train.jsonl"))
    with layout.lock(living.parent):
        cache.trim()
    assert (dead.exists(), living.exists(), torn.exists()) == (False, True, False)


def test_a_cache_that_made_nothing_removes_nothing(tmp_path: Path, tokenizer: Any) -> None:
    load(data(tmp_path / "one.jsonl"), tokenizer)
    load(data(tmp_path / "two.jsonl", 100), tokenizer)
    cache = TokenCache(tokenizer, small=0, limit=0)
    cache.load(tmp_path / "one.jsonl")
    cache.trim()
    assert len(stores()) == 2


def test_the_limits_are_sane() -> None:
    assert token_cache.SMALL_BYTES < 10**6 < token_cache.LIMIT_BYTES
