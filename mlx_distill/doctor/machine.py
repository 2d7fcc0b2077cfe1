"""The machine itself: operating system, chip, memory, disks."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from mlx_distill import layout
from mlx_distill.doctor.finding import Finding, State

#: Bytes. The default student takes 3.1 GB in bfloat16, in memory as on the disk, and its fused model as much again.
_LITTLE_MEMORY, _LITTLE_DISK, _NO_DISK = 4e9, 8e9, 1e9

_CPUINFO, _MEMINFO = Path("/proc/cpuinfo"), Path("/proc/meminfo")
#: What a container may use, in its version 2 and 1.
_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_SYSCTL, _VM_STAT = "/usr/sbin/sysctl", "/usr/bin/vm_stat"

#: What processors call themselves in /proc/cpuinfo, the best name first. Many for arm64 give none.
_CHIP_NAMES = ("model name", "Model", "Hardware")

_FOLDERS = (Path("data"), Path("adapters"), Path("visuals"))


def on_mac() -> bool:
    """Whether this is macOS."""
    return platform.system() == "Darwin"


def system() -> list[Finding]:
    """Operating system and architecture."""
    kind = platform.machine()
    if on_mac():
        found = f"macOS {platform.mac_ver()[0]}, {kind}"
        if kind != "arm64":
            remedy = "On Apple Silicon, install a Python made for arm64; MLX has none for Intel."
            return [Finding("system", "missing", f"{found}, which MLX does not run on", remedy, required=True)]
        return [Finding("system", "ok", found, required=True)]
    name = platform.platform(terse=True)
    with contextlib.suppress(OSError):  # a Linux without /etc/os-release
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    return [Finding("system", "ok", f"{name}, {kind}", required=True)]


def chip() -> list[Finding]:
    """The processor's own name, and its cores."""
    name = _output(_SYSCTL, "-n", "machdep.cpu.brand_string") if on_mac() else _linux_chip()
    return [Finding("chip", "ok", f"{name}, {os.cpu_count()} cores")]


def memory() -> list[Finding]:
    """Memory in all, and what is free or can be freed at once."""
    total, available = _mac_memory() if on_mac() else _linux_memory()
    found = f"{total / 1e9:.1f} GB, {available / 1e9:.1f} GB available"
    if available < _LITTLE_MEMORY:
        remedy = "End other programs, or train with less:  mlx-distill train --micro-batch-size 1 …"
        return [Finding("memory", "warning", found, remedy)]
    return [Finding("memory", "ok", found)]


def disks() -> list[Finding]:
    """Room on each disk that runs, data sets or models are written to: one row a disk."""
    places = [*_FOLDERS, layout.models_cache()]
    with contextlib.suppress(ImportError):  # that it is missing is a row of its own
        from huggingface_hub import constants

        places.append(Path(constants.HF_HUB_CACHE))
    by_disk: dict[int, list[Path]] = {}
    for place in places:
        by_disk.setdefault(_existing(place).stat().st_dev, []).append(place)
    return [_disk(place) for place in by_disk.values()]


def _disk(places: list[Path]) -> Finding:
    free = shutil.disk_usage(_existing(places[0])).free
    locked = [place for place in places if not os.access(_existing(place), os.W_OK | os.X_OK)]
    state: State = "missing" if locked or free < _NO_DISK else "warning" if free < _LITTLE_DISK else "ok"
    found = f"{_names(locked)} cannot be written" if locked else f"{free / 1e9:.1f} GB free for {_names(places)}"
    return Finding("disk", state, found, None if state == "ok" else _elsewhere(places), required=True)


def _elsewhere(places: list[Path]) -> str:
    if all(place in _FOLDERS for place in places):
        return "Free some space, or work in a folder on another disk."
    move = "export MLX_DISTILL_CACHE=FOLDER HF_HUB_CACHE=FOLDER"
    also = ", and work in a folder there" if any(place in _FOLDERS for place in places) else ""
    return f"Free some space (the Hub's models:  hf cache ls), or keep models on another disk{also}:  {move}"


def _names(places: Iterable[Path]) -> str:
    home = Path.home()
    short = [Path("~") / place.relative_to(home) if place.is_relative_to(home) else place for place in places]
    return ", ".join(f"{place}/" for place in short)


def _existing(place: Path) -> Path:
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return place


def _linux_chip() -> str:
    lines = (line.partition(":") for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines())
    told = {key.strip(): value.strip() for key, _, value in lines}
    return next((told[name] for name in _CHIP_NAMES if told.get(name)), platform.machine())


def _linux_memory() -> tuple[int, int]:
    lines = (line.split() for line in _MEMINFO.read_text(encoding="utf-8").splitlines())
    kilobytes = {line[0].rstrip(":"): int(line[1]) for line in lines}
    total, available = kilobytes["MemTotal"] * 1024, kilobytes["MemAvailable"] * 1024
    for path in _CGROUP_LIMITS:
        # "max", or a number beyond all memory, is no limit. What the container uses already is not subtracted.
        if path.is_file() and (limit := path.read_text(encoding="utf-8").strip()).isdigit():
            total, available = min(total, int(limit)), min(available, int(limit))
    return total, available


def _mac_memory() -> tuple[int, int]:
    told = _output(_VM_STAT)
    size = re.search(r"page size of (\d+) bytes", told)
    if size is None:
        raise ValueError("vm_stat names no page size")
    pages = {kind: int(count) for kind, count in re.findall(r"Pages (\w+): +(\d+)", told)}
    available = (pages["free"] + pages["speculative"] + pages["inactive"]) * int(size[1])
    return int(_output(_SYSCTL, "-n", "hw.memsize")), available


def _output(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10, stdin=subprocess.DEVNULL, errors="replace"
    )
    return done.stdout.strip()
