"""Whether an export says what the student says: each is loaded in a process of its own, and both answer one probe."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mlx_distill.agreement import Agreement, Observation, Probe, agreement
from mlx_distill.children import run_module
from mlx_distill.errors import ModelError
from mlx_distill.export.observer import MARK, Engine, Job
from mlx_distill.export.records import Kind
from mlx_distill.progress import Progress


@dataclass(frozen=True)
class Consumer:
    """What loads an export.

    Attributes:
        packages: It is made of, the one that matters first.
        extra: Of mlx-distill that brings them; None where they are always there.
    """

    engine: Engine
    packages: tuple[str, ...]
    extra: str | None

    def missing(self) -> str | None:
        """The first of its packages that is not installed."""
        return next((name for name in self.packages if _version(name) is None), None)

    def describe(self) -> str:
        """Its packages with their versions."""
        return ", ".join(f"{name} {_version(name)}" for name in self.packages)


CONSUMERS: dict[Kind, Consumer] = {
    "peft": Consumer("torch", ("peft", "transformers", "torch"), "torch"),
    "hf": Consumer("torch", ("transformers", "torch"), "torch"),
    "mlx": Consumer("mlx", ("mlx-lm", "mlx"), None),
    "gguf": Consumer("llama_cpp", ("xllamacpp",), "llama-cpp"),
    "ollama": Consumer("llama_cpp", ("xllamacpp",), "llama-cpp"),
}

#: Largest mean divergence, in nats a position, by what became of the weights. Two libraries that compute the same
#: numbers in float32 are some 1e-10 apart; a wrong scale, a transposed factor or a forgotten permutation 1e-1 and more.
EXACT = 1e-5
#: Matrices rounded to 16 bits, and computed with as llama.cpp does.
ROUNDED_16 = 1e-3
#: Matrices rounded to 8 bits in blocks of 32, by a consumer that rounds what it multiplies them with as well: of
#: SmolLM2-135M, which is small, 8e-3.
ROUNDED_8 = 3e-2


@dataclass(frozen=True)
class Model:
    """A model to be looked at.

    Attributes:
        engine: That loads it.
        path: Its folder, or its .gguf file.
        adapter: Folder of an adapter on it, in the engine's format.
    """

    engine: Engine
    path: Path
    adapter: Path | None = None


def compare(probe: Probe, student: Model, exported: Model, work: Path, progress: Progress, *, name: str) -> Agreement:
    """Let both answer, one after the other.

    Args:
        student: The reference, on MLX.
        work: A folder for what they say.
        name: Of the consumer, for the messages.

    Raises:
        ModelError: One of them does not load, or gives what is no number.
    """
    with progress.task("Asking the student"):
        reference = _observe(student, probe, work / "student", "MLX")
    with progress.task(f"Asking the export, by way of {name}"):
        found = _observe(exported, probe, work / "export", name)
    result = agreement(probe, reference, found)
    if not result.finite:
        raise ModelError("The export, or the student, gives values that are no numbers.", hint=_HINT)
    return result


def require_agreement(found: Agreement, limit: float | None, name: str) -> None:
    """Refuse an export that says something else.

    Raises:
        ModelError: Says by how much.
    """
    if limit is not None and found.kl > limit:
        raise ModelError(
            f"{name} loads the export, but it does not say what the student says: {found.kl:.2g} nats of divergence a "
            f"position, where {limit:g} are allowed; the likeliest token is the same at {found.same_choice:.1%} of "
            f"{found.positions} positions.",
            hint=_HINT,
        )


_HINT = "Nothing was left behind. To have it all the same, unchecked:  --no-verify"


def _observe(model: Model, probe: Probe, out: Path, name: str) -> Observation:
    out.mkdir(parents=True)
    job = Job(
        engine=model.engine,
        model=model.path.absolute(),
        adapter=None if model.adapter is None else model.adapter.absolute(),
        probe=probe,
        out=out.absolute(),
    )
    log = out / "log.txt"
    # Apple's chips since the M5, and NVIDIA's, would multiply float32 with the mantissa of float16.
    environment = {"MLX_ENABLE_TF32": "0", "TOKENIZERS_PARALLELISM": "false"}
    status = run_module("mlx_distill.export.observer", log=log, environment=environment, line=job.to_json())
    if status != 0:
        raise ModelError(f"{name} did not take it: {_reason(status, log)}", hint=_HINT)
    return Observation.load(out)


def _reason(status: int, log: Path) -> str:
    if status < 0:
        name = signal.Signals(-status).name
        return f"it was killed by {name}" + (", as where memory runs out." if name == "SIGKILL" else ".")
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    if MARK in text:
        return text.rpartition(MARK)[2].strip()
    return (text.splitlines() or [f"exit status {status}"])[-1][:300]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name) or None
    except metadata.PackageNotFoundError:
        return None
