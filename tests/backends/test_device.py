"""What MLX says of its memory, on each of its devices."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_distill.backends.memory import MEMORY_SHARE, machine_bytes
from mlx_distill.backends.mlx import device
from mlx_distill.errors import MlxDistillError, ModelError, ResourceError

GB = 10**9

#: As MLX's CUDA backend says it.
CUDA: dict[str, str | int] = {
    "device_name": "NVIDIA H200",
    "architecture": "sm_90",
    "compute_capability_major": 9,
    "compute_capability_minor": 0,
    "free_memory": 100 * GB,
    "total_memory": 150 * GB,
}


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, info: dict[str, str | int], *, metal: bool) -> None:
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
    monkeypatch.setattr(mx, "device_info", lambda: info)


def test_on_cuda_training_may_take_most_of_what_the_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_gpu(monkeypatch, CUDA, metal=False)
    assert device.total_memory_bytes() == 150 * GB
    assert device.available_memory_bytes() == int(150 * GB * MEMORY_SHARE)
    assert device.describe_device() == "GPU (NVIDIA H200)"
    device.prepare_memory()


@pytest.mark.parametrize(("info", "total"), [({"memory_size": 64 * GB}, 64 * GB), ({}, machine_bytes())])
def test_other_names_for_it_are_known(monkeypatch: pytest.MonkeyPatch, info: dict[str, str | int], total: int) -> None:
    on_a_gpu(monkeypatch, info, metal=False)
    assert device.total_memory_bytes() == total


def test_on_metal_it_is_what_metal_recommends(monkeypatch: pytest.MonkeyPatch) -> None:
    info: dict[str, str | int] = {"memory_size": 64 * GB, "max_recommended_working_set_size": 48 * GB}
    on_a_gpu(monkeypatch, info, metal=True)
    assert device.available_memory_bytes() == 48 * GB


@pytest.mark.parametrize(
    "text",
    [
        "[malloc] Unable to allocate 99 bytes.",
        "[metal::malloc] Attempting to allocate 99 bytes",
        "[METAL] Command buffer execution failed: Insufficient Memory (00000008)",
        "cudaMallocAsync(&data, size, stream) failed: out of memory",
    ],
)
def test_a_failed_allocation_is_explained_once(text: str) -> None:
    with (
        pytest.raises(ResourceError) as caught,
        device.explained_allocation("Outer."),
        device.explained_allocation("Inner."),
    ):
        raise RuntimeError(text)
    assert str(caught.value) == f"The machine is out of memory: {text}\n  Inner."


@pytest.mark.parametrize("error", [RuntimeError("another"), ModelError("out of memory"), ValueError("malloc]")])
def test_what_is_none_stays_what_it_is(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, device.explained_allocation("Advice."):
        raise error
    assert caught.value is error
    assert isinstance(error, MlxDistillError) == isinstance(error, ModelError)
