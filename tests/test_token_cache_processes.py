"""The cache of tokens among processes: killed at any moment, several at once, and how much memory a large one takes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mlx_distill.batches import TokenRow
from mlx_distill.layout import file_sha256
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.records import content_hash
from mlx_distill.token_cache import token_folder
from mlx_distill.token_store import HEADER, STORE_FORMAT, StoreWriter, open_store, store_files
from mlx_distill.tokenising import tokenizer_identity
from tests.children import child

#: Loads the file `argv[1]` with the tokenizer of `argv[0]`, always through the cache.
HEAD = """
import json
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.progress import Progress
from mlx_distill.token_cache import TokenCache, token_folder

class Teller(Progress):
    def task(self, title, total=None, *, unit=""):
        print(title, flush=True)
        return super().task(title, total, unit=unit)

tokenizer = load_tokenizer(argv[0])

def load():
    store = TokenCache(tokenizer, small=0, progress=Teller()).load(argv[1]).store
    return [store.row(at).tokens.tolist() for at in range(len(store))]
"""

#: Kills a copy of this process at every call that changes the disk, one after the other, and looks at what is left.
KILLS = (
    HEAD
    + """
import shutil
from mlx_distill import token_store

expected = TokenCache(tokenizer, small=1 << 40).load(argv[1]).store
expected = [expected.row(at).tokens.tolist() for at in range(len(expected))]

def arm(moment):
    left = [moment]
    def counted(function):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)
        return call
    os.fsync, os.mkdir, os.rename = counted(os.fsync), counted(os.mkdir), counted(os.rename)
    os.ftruncate, os.pwrite = counted(os.ftruncate), counted(os.pwrite)
    Path.write_text, Path.chmod = counted(Path.write_text), counted(Path.chmod)
    token_store.StoreWriter._write = counted(token_store.StoreWriter._write)
    token_store.StoreWriter.finish = counted(token_store.StoreWriter.finish)

def status_of(work):
    process = os.fork()
    if process == 0:
        code = 70
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

def die_at(moment):
    arm(moment)
    load()

def look():
    assert load() == expected

def store():
    return [path for path in token_folder().rglob("header.json")]

moment = seen_half = seen_whole = 0
while True:
    moment += 1
    status = status_of(lambda: die_at(moment))
    if status == 0:
        break
    assert status == -signal.SIGKILL, status
    left = list(token_folder().rglob("*.part-*")) if token_folder().exists() else []
    seen_half += bool(left)
    seen_whole += bool([path for path in store() if ".part-" not in str(path)])
    assert status_of(look) == 0
    assert not list(token_folder().rglob("*.part-*"))
    assert len(store()) == 1
    shutil.rmtree(token_folder())
print(json.dumps([moment, seen_half, seen_whole]))
"""
)

#: Says how much memory it took at most to plan an epoch and to make some of its batches.
MEMORY = (
    HEAD
    + """
import resource
from mlx_distill import dataset, token_cache
from mlx_distill.batches import in_order, make_batch, plan_epoch

token_cache.TokenCache.__init__.__kwdefaults__["small"] = 0
split = dataset.load_splits(argv[1].parent, tokenizer, max_length=512, progress=Teller())["train"]
assert split.summary().rows == len(split.rows)
plan = plan_epoch(split.lengths, 4, seed=0, epoch=0)
for at in range(0, len(plan), max(1, len(plan) // 500)):
    make_batch(split.rows, plan[at])
next(in_order(split.rows, 4, split.lengths))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([len(split.rows), peak * (1 if sys.platform == "darwin" else 1024)]))
"""
)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DISTILL_CACHE", str(tmp_path / "cache"))


def said(process: subprocess.Popen[str], *, seconds: float = 120) -> list[str]:
    out, err = process.communicate(timeout=seconds)
    assert process.returncode == 0, err
    return out.splitlines()


def data(path: Path, rows: int) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f'{{"text": "def f{at}(): return {at * 7}"}}\n' for at in range(rows)), encoding="utf-8")
    return path


def test_killed_at_any_moment_the_cache_is_usable(tmp_path: Path, tiny_model: Path) -> None:
    lines = said(child(KILLS, tiny_model, data(tmp_path / "train.jsonl", 3)))
    moments, half, whole = json.loads(lines[-1])
    assert moments > 20
    assert half > 10
    assert whole >= 1


def test_of_several_processes_one_makes_the_tokens(tmp_path: Path, tiny_model: Path) -> None:
    """They are let go at the same time; each waits for a line before it loads."""
    path = data(tmp_path / "train.jsonl", 3000)
    source = HEAD + "print('ready', flush=True)\nsys.stdin.readline()\nprint(json.dumps(load()))\n"
    processes = [child(source, tiny_model, path) for _ in range(3)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    lines = [said(process) for process in processes]
    assert len({each[-1] for each in lines}) == 1
    assert len(json.loads(lines[0][-1])) == 3000
    assert sorted(each[:-1] for each in lines) == [[], [], ["Tokenising train.jsonl"]]
    assert len(list(token_folder().rglob(HEADER))) == 1


@pytest.mark.slow
def test_200000_rows_take_hardly_more_memory_than_200(tmp_path: Path, tiny_model: Path) -> None:
    peaks = []
    for rows in (200, 200_000):
        path = data(tmp_path / str(rows) / "train.jsonl", rows)
        fill_cache(path, tiny_model, rows)
        (line,) = said(child(MEMORY, tiny_model, path))
        found, peak = json.loads(line)
        assert found == rows
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 60e6


def fill_cache(path: Path, model: Path, rows: int) -> None:
    """Puts a store in the place of the one that tokenising the file would make, which would take longer."""
    identity = tokenizer_identity(load_tokenizer(model))
    key = content_hash({"format": STORE_FORMAT, "data": file_sha256(path), "tokenizer": identity})[:32]
    folder = token_folder() / key[:2] / key
    folder.mkdir(parents=True)
    with store_files(folder) as files:
        writer = StoreWriter(files, "<u2")
        made = [TokenRow(np.full(length, length, dtype=np.int32), np.arange(length) > 0) for length in range(8, 33)]
        for at in range(rows):
            writer.add(at + 1, made[at % len(made)])
        header = writer.finish(key=key)
    (folder / HEADER).write_text(header.to_json(), encoding="utf-8")
    assert len(open_store(folder, key=key)) == rows
