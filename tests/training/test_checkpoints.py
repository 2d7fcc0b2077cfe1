"""Checkpoints: whole or skipped, the newest ones kept, never a wrong one taken."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from mlx_distill import layout
from mlx_distill.backends.base import State
from mlx_distill.errors import TrainingError
from mlx_distill.training.checkpoints import Cursor, Sums, newest, save
from tests.training.faults import refuse
from tests.training.runs import ROOT, Recorder


def state(step: int) -> State:
    generator = np.random.default_rng(step)
    return State(
        {
            "adapter.model.layers.0.lora_a": generator.standard_normal((5, 4)).astype(np.float32),
            "adapter.model.layers.0.lora_b": np.zeros((4, 5), dtype=np.float32),
            "optimizer.step": np.array(step, dtype=np.uint64),
            "optimizer.learning_rate": np.array(0.1, dtype=np.float32),
            "random.0": np.array([1, step], dtype=np.uint32),
            "empty": np.zeros((0, 3), dtype=np.float32),
        }
    )


def cursor(step: int) -> Cursor:
    return Cursor(epoch=1, batch=step, step=step, metric_rows=step + 2, epoch_sums=Sums(loss_sum=1 / 3), best_loss=0.1)


def fill(folder: Path, steps: list[int], *, keep: int = 99) -> list[Path]:
    for step in steps:
        save(folder, cursor(step), state(step), keep=keep)
    return sorted(folder.glob("*.safetensors"))


def check(found: tuple[Cursor, State] | None, step: int) -> None:
    assert found is not None
    assert found[0] == cursor(step)
    assert found[1].arrays.keys() == state(step).arrays.keys()
    for name, value in state(step).arrays.items():
        assert (found[1].arrays[name].dtype, found[1].arrays[name].shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(found[1].arrays[name], value)


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    fill(tmp_path, [3])
    check(newest(tmp_path, Recorder()), 3)


def test_a_value_in_another_memory_order_comes_back_as_it_is(tmp_path: Path) -> None:
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    save(tmp_path, cursor(1), State({"adapter.x": turned, "adapter.y": turned[::2]}), keep=1)
    found = newest(tmp_path, Recorder())
    assert found is not None
    np.testing.assert_array_equal(found[1].arrays["adapter.x"], [[0, 3], [1, 4], [2, 5]])
    np.testing.assert_array_equal(found[1].arrays["adapter.y"], [[0, 3], [2, 5]])


def test_a_checkpoint_of_a_version_that_knew_less_loads(tmp_path: Path) -> None:
    """What was added to the cursor since has a default that goes on as if it had been there."""
    old = {"epoch": 1, "batch": 2, "step": 6, "metric_rows": 9, "best_loss": 1.5, "best_step": 4}
    assert Cursor.model_validate(old) == Cursor(**old, stale=0, validated_step=None, window=Sums(), lowest_loss=None)


def test_there_may_be_none(tmp_path: Path) -> None:
    assert newest(tmp_path, Recorder()) is None
    assert newest(tmp_path / "none", Recorder()) is None


def test_the_newest_is_taken_by_its_number_not_its_age(tmp_path: Path) -> None:
    for age, path in enumerate(fill(tmp_path, [9, 20, 100])):
        os.utime(path, (1e9 - age, 1e9 - age))
    check(newest(tmp_path, Recorder()), 100)


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    left = fill(tmp_path, [2, 4, 6, 8, 10], keep=keep)
    assert [int(path.stem.removeprefix("step-")) for path in left] == [2, 4, 6, 8, 10][-keep:]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut-in-the-length": lambda content: content[:5],
    "cut-in-the-head": lambda content: content[:40],
    "cut-by-one-byte": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "zeros": lambda content: bytes(len(content)),
    "text": lambda content: b"{}",
    "huge-head": lambda content: b"\xff" * 8 + content[8:],
    "no-metadata": lambda content: content.replace(b"__metadata__", b"__metadat4__"),
    "value": lambda content: content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
    "cursor": lambda content: content.replace(b'\\"step\\":8', b'\\"step\\":9'),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_newest_is_skipped_with_a_message(tmp_path: Path, kind: str) -> None:
    newest_file = fill(tmp_path, [4, 8])[-1]
    content = newest_file.read_bytes()
    damaged = DAMAGES[kind](content)
    assert damaged != content
    newest_file.write_bytes(damaged)
    recorder = Recorder()
    check(newest(tmp_path, recorder), 4)
    (said,) = recorder.said
    assert said.startswith(f"{newest_file} is damaged (")


def test_all_damaged_is_not_as_none(tmp_path: Path) -> None:
    for path in fill(tmp_path, [4, 8]):
        path.write_bytes(path.read_bytes()[:-1])
    recorder = Recorder()
    with pytest.raises(TrainingError, match=f"All checkpoints in {tmp_path} are damaged"):
        newest(tmp_path, recorder)
    assert len(recorder.said) == 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_one_that_cannot_be_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """What is in it may be whole: the one before it would lose steps that are there."""
    path = fill(tmp_path, [4, 8])[-1]
    with monkeypatch.context() as patch:
        refuse(patch, path, number)
        with pytest.raises(TrainingError, match=f"{path} cannot be read: {os.strerror(number)}") as caught:
            newest(tmp_path, Recorder())
    assert caught.value.hint is not None
    check(newest(tmp_path, Recorder()), 8)


def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, [4])

    def refused(_path: Path) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", refused)
        with pytest.raises(TrainingError, match=f"{tmp_path} cannot be read: Permission denied"):
            newest(tmp_path, Recorder())
    check(newest(tmp_path, Recorder()), 4)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A checkpoint of step 4 and one of step 8: the newer file and its content."""
    newest_file = fill(tmp_path_factory.mktemp("flipped"), [4, 8])[-1]
    return newest_file, newest_file.read_bytes()


@examples(max_examples=400, deadline=None)
@given(at=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_a_single_flipped_bit_is_never_taken(two: tuple[Path, bytes], at: int, bit: int) -> None:
    """Anywhere: in the length, the head, the cursor or the tensors. The file before it is taken, unchanged."""
    newest_file, whole = two
    content = bytearray(whole)
    content[at % len(content)] ^= 1 << bit
    newest_file.write_bytes(content)
    found = newest(newest_file.parent, Recorder())
    # A flip that leaves all of the content as it was (white space of the head's padding) may pass.
    check(found, 4 if found is not None and found[0].step == 4 else 8)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_one_does_not_push_out_what_is_saved_after_it(tmp_path: Path, keep: int) -> None:
    """A run that went back from a damaged step 50 to 25 saves 30: that is its newest whole checkpoint from then on."""
    fill(tmp_path, [25, 50])[-1].write_bytes(b"damaged")
    save(tmp_path, cursor(30), state(30), keep=keep)
    check(newest(tmp_path, Recorder()), 30)


def test_a_file_left_by_a_killed_writer_is_not_taken(tmp_path: Path) -> None:
    whole = fill(tmp_path, [4])[-1].read_bytes()
    (tmp_path / ".step-00000008-abc.safetensors").write_bytes(whole[:100])
    recorder = Recorder()
    check(newest(tmp_path, recorder), 4)
    assert recorder.said == []


SAVING = """
import sys
from pathlib import Path
import numpy as np
from mlx_distill.backends.base import State
from mlx_distill.training.checkpoints import Cursor, save
for step in range(1000):
    save(Path(sys.argv[1]), Cursor(step=step), State({"a": np.full(8_000_000, step, np.float32)}), keep=2)
"""


def test_a_kill_in_the_midst_of_saving_leaves_nothing_that_stays(tmp_path: Path) -> None:
    """Whole checkpoints and what `sweep` knows; safetensors' own writer would leave files under names of its own."""
    for wait in (0.0, 0.03, 0.06, 0.1):
        folder = tmp_path / str(wait)
        child = subprocess.Popen([sys.executable, "-c", SAVING, folder], cwd=ROOT)
        end = time.monotonic() + 60
        while not list(folder.glob("step-*")) and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(wait)
        child.kill()
        child.wait()
        layout.sweep(folder)
        assert newest(folder, Recorder()) is not None
        assert {path.suffix for path in folder.iterdir()} == {".safetensors"}
        assert not list(folder.glob(".*"))
