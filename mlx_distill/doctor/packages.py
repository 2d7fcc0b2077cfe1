"""Python and what is installed in it, by its metadata: nothing is imported.

What a package should be is what this package's own metadata states of it, so that versions stand in one place.
"""

from __future__ import annotations

import contextlib
import platform
import shlex
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from mlx_distill import __version__
from mlx_distill.doctor.finding import Finding

if TYPE_CHECKING:
    from packaging.requirements import Requirement


@dataclass(frozen=True)
class Package:
    """A package that is looked for.

    Attributes:
        required: Whether nothing works without it.
        absent: What is said where it is missing.
        module: A module that brings it where pip itself is what is missing.
    """

    required: bool = False
    absent: str = "not installed"
    module: str | None = None


#: In the order in which they are shown.
PACKAGES: dict[str, Package] = {
    "mlx": Package(required=True),
    "mlx-lm": Package(required=True),
    "transformers": Package(required=True),
    "huggingface_hub": Package(required=True),
    "anthropic": Package(absent="not installed; anthropic:MODEL teachers need it"),
    "pip": Package(absent="not installed; the bundled student is fetched with it", module="ensurepip"),
    "torch": Package(absent="not installed; optional, for --backend torch and bench: pip install 'mlx-distill[torch]'"),
}


def python() -> list[Finding]:
    """The interpreter, and the version of this package."""
    return [
        Finding("Python", "ok", f"{platform.python_version()}, {sys.executable}"),
        Finding("mlx-distill", "ok", __version__),
    ]


def package(name: str) -> list[Finding]:
    """Whether one of `PACKAGES` is installed, and in a version that this package was made for."""
    wanted = PACKAGES[name]
    remedy = f"{shlex.quote(sys.executable)} -m {wanted.module}" if wanted.module else install(name)
    version = installed(name)
    if version is None:
        return [Finding(name, "missing", wanted.absent, remedy, wanted.required)]
    stated = _requirement(name)
    if stated is not None and not stated.specifier.contains(version, prereleases=True):
        return [Finding(name, "warning", f"{version}, but made for {stated.specifier}", remedy, wanted.required)]
    return [Finding(name, "ok", version, required=wanted.required)]


def installed(name: str) -> str | None:
    """The version of an installed package, or None. Half-removed packages have no version and are not there."""
    try:
        return metadata.version(name) or None
    except metadata.PackageNotFoundError:
        return None


def install(name: str, *flags: str, extra: str | None = None) -> str:
    """The command that installs a package into this Python, in the versions that this package was made for.

    Args:
        extra: In place of the extras that this package would have.
    """
    stated = _requirement(name)
    if extra is None and name == "mlx" and platform.system() == "Linux":
        extra = "cpu"
    plain = f"{name}[{extra}]" if extra else name
    if stated is not None and extra is not None:
        stated.extras = {extra}
    # This interpreter's own pip: the one on the path may belong to another Python.
    return shlex.join([sys.executable, "-m", "pip", "install", *flags, str(stated) if stated else plain])


def _requirement(name: str) -> Requirement | None:
    """What this package states of another, on this platform; None where it states nothing, or is not installed."""
    with contextlib.suppress(ImportError):  # which a package that is not there is, too
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name

        for line in metadata.requires("mlx-distill") or []:
            stated = Requirement(line)
            applies = stated.marker is None or stated.marker.evaluate({"extra": ""})
            if applies and canonicalize_name(stated.name) == canonicalize_name(name):
                stated.marker = None
                return stated
    return None
