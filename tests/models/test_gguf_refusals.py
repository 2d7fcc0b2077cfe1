"""What is not a GGUF that can be converted is refused by name, and nothing half made is left."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Ggml

from mlx_distill import layout
from mlx_distill.errors import InputError, MlxDistillError, ModelError, ResourceError
from mlx_distill.models.gguf import cached_folder, convert_gguf
from mlx_distill.models.gguf_reader import read_gguf
from mlx_distill.progress import Progress
from tests.tiny import make_tiny_model
from tests.tiny_gguf import write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_DISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("llama"), architecture="llama", layers=2)


@pytest.fixture(scope="session")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_gguf(llama, tmp_path_factory.mktemp("gguf") / "tiny.gguf").read_bytes()


def nothing_left(cache: Path) -> bool:
    return not [path for path in cache.rglob("*") if path.name not in (".lock", "gguf") and path.is_file()]


def test_unknown_architecture_is_named(llama: Path, tmp_path: Path, cache: Path) -> None:
    path = write_gguf(llama, tmp_path / "tiny.gguf", architecture="mamba")
    with pytest.raises(ModelError, match="'mamba'") as caught:
        convert_gguf(path)
    assert caught.value.hint is not None
    assert nothing_left(cache)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lambda w: w.add_tensor("blk.0.ffn_gate_exps.weight", np.zeros((2, 4, 4), np.float32)), "ffn_gate_exps"),
        (lambda w: w.add_tensor("blk.0.attn_q.scale", np.zeros(4, np.float32)), "attn_q.scale"),
        (lambda w: w.add_tensor("blk.0.attn_q.bias", np.arange(64, dtype=np.int32)), "I32"),
        (lambda w: w.add_uint16("split.count", 3), "split over 3 files"),
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "longrope"),
    ],
)
def test_what_a_plain_model_lacks_is_named(
    llama: Path, tmp_path: Path, cache: Path, extra: Callable[[gguf.GGUFWriter], None], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        convert_gguf(write_gguf(llama, tmp_path / "tiny.gguf", extra=extra))
    assert nothing_left(cache)


@pytest.mark.parametrize("missing", ["token_embd.weight", "blk.1.ffn_up.weight", "output_norm.weight"])
def test_missing_tensor_is_named(llama: Path, tmp_path: Path, missing: str) -> None:
    with pytest.raises(ModelError, match=missing):
        convert_gguf(write_gguf(llama, tmp_path / "tiny.gguf", leave_out=(missing,)))


def test_missing_bias_of_qwen2_is_named(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=1)
    with pytest.raises(ModelError, match=r"blk\.0\.attn_k\.bias"):
        convert_gguf(write_gguf(model, tmp_path / "tiny.gguf", leave_out=("blk.0.attn_k.bias",)))


def test_unknown_tensor_type_is_named(whole: bytes, tmp_path: Path) -> None:
    name = b"token_embd.weight"
    at = whole.index(name) + len(name) + 4 + 2 * 8
    assert struct.unpack_from("<I", whole, at) == (Ggml.F32,)
    path = tmp_path / "tiny.gguf"
    path.write_bytes(whole[:at] + struct.pack("<I", 997) + whole[at + 4 :])
    with pytest.raises(ModelError, match="997"):
        convert_gguf(path)


def test_value_beyond_float16_is_named(tmp_path: Path, cache: Path) -> None:
    model = make_tiny_model(tmp_path / "model", architecture="llama", layers=1)

    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("output_norm.weight", np.full(64, 1e6, np.float32))

    path = write_gguf(model, tmp_path / "t.gguf", kind=Ggml.Q8_0, extra=extra, leave_out=("output_norm.weight",))
    with pytest.raises(ModelError, match="output_norm"):
        convert_gguf(path)
    assert nothing_left(cache)


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.01, 0.05, 0.3, 0.9, 0.999999])
def test_a_cut_file_is_refused(whole: bytes, tmp_path: Path, cache: Path, share: float) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(InputError, match=r"tiny\.gguf"):
        convert_gguf(path)
    assert nothing_left(cache)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(InputError, match="no such file"):
            convert_gguf(path)


@pytest.mark.parametrize("count", [2**63, 2**40, 2**64 - 1])
def test_a_count_beyond_the_file_is_refused_at_once(whole: bytes, tmp_path: Path, count: int) -> None:
    key = b"tokenizer.ggml.token_type"
    at = whole.index(key) + len(key) + 4 + 4  # past the value's type and the elements' type
    path = tmp_path / "tiny.gguf"
    path.write_bytes(whole[:at] + struct.pack("<Q", count) + whole[at + 8 :])
    started = time.monotonic()
    with pytest.raises(InputError):
        read_gguf(path)
    path.write_bytes(whole[:8] + struct.pack("<QQ", count, count) + whole[24:])
    with pytest.raises(InputError):
        read_gguf(path)
    assert time.monotonic() - started < 5


def test_damaged_heads_never_end_in_a_traceback(whole: bytes, tmp_path: Path) -> None:
    chance = random.Random(0)
    head = whole.index(b"blk.1.") + 400
    refused = 0
    for round_ in range(150):
        damaged = bytearray(whole)
        for _ in range(chance.choice([1, 1, 3, 20])):
            damaged[chance.randrange(head)] = chance.randrange(256)
        path = tmp_path / f"{round_}.gguf"
        path.write_bytes(damaged)
        try:
            convert_gguf(path, sha256=f"{round_:064d}")
        except MlxDistillError:
            refused += 1
        path.unlink()
    assert refused > 20


def test_full_disk_is_said_before_work_begins(
    whole: bytes, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(whole)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(layout.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match=r"tiny\.gguf"):
        convert_gguf(path)
    assert nothing_left(cache)


def test_cache_that_cannot_be_written(whole: bytes, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(whole)
    cache.write_text("a file where the folder should be")
    with pytest.raises(ResourceError, match="MLX_DISTILL_CACHE"):
        convert_gguf(path)


_DIES = """
import os, signal, sys
from pathlib import Path
from mlx_distill.models import gguf
whole = gguf.convert_tensors
def cut(source, plan):
    for count, array in enumerate(whole(source, plan)):
        if count == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        yield array
gguf.convert_tensors = cut
gguf.convert_gguf(Path(sys.argv[1]))
"""


def test_a_kill_leaves_nothing_that_looks_whole(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(whole)
    died = subprocess.run([sys.executable, "-c", _DIES, str(path)], check=False, env=os.environ, capture_output=True)
    assert died.returncode == -signal.SIGKILL
    folder = cached_folder(layout.file_sha256(path))
    assert not folder.exists()
    assert convert_gguf(path) == folder
    assert (folder / "model.safetensors").is_file()


def test_two_processes_at_once_make_one(whole: bytes, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(whole)
    code = "import sys; from pathlib import Path; from mlx_distill.models.gguf import convert_gguf\n"
    code += "print(convert_gguf(Path(sys.argv[1])))"
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert [entry.name for entry in next((cache / "gguf").iterdir()).iterdir() if entry.name != ".lock"] == ["model"]


def test_waiting_for_another_process_is_told(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(whole)
    folder = cached_folder(layout.file_sha256(path))
    told = threading.Event()

    class Told(Progress):
        def say(self, line: str) -> None:
            told.set()

    made: list[Path] = []
    with layout.lock(folder.parent):
        other = threading.Thread(target=lambda: made.append(convert_gguf(path, progress=Told())))
        other.start()
        assert told.wait(10)
        assert not folder.exists()
    other.join(30)
    assert made == [folder]
