"""One process that loads one model with its own consumer, and writes what it says.

    python -m mlx_distill.export.observer < JOB

torch and MLX are so never in memory together, and a consumer that crashes takes nothing along. The job is the first
line of standard input; where that is closed the parent is gone, and this process ends.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal

from mlx_distill.agreement import Probe
from mlx_distill.children import end_with_parent
from mlx_distill.errors import MlxDistillError
from mlx_distill.models.tokenizer import leave_out_torch
from mlx_distill.records import Record

Engine = Literal["mlx", "torch", "llama_cpp"]

#: Before an error's text on standard error.
MARK = "mlx-distill: "


class Job(Record):
    """What is to be observed.

    Attributes:
        engine: That loads it.
        model: A folder in Hugging Face layout, or a .gguf file.
        adapter: Folder of an adapter in the engine's format.
        out: Folder of the observation.
    """

    engine: Engine
    model: Path
    adapter: Path | None = None
    probe: Probe
    out: Path


def observe(job: Job) -> None:
    """Do a job.

    Raises:
        MlxDistillError: The engine does not take the model.
    """
    if job.engine == "torch":
        from mlx_distill.backends.torch.observing import observe_folder

        observe_folder(job.model, job.adapter, job.probe, job.out)
    elif job.engine == "llama_cpp":
        from mlx_distill.backends.llama_cpp import observe_file

        observe_file(job.model, job.probe, job.out)
    else:
        _on_mlx(job)


def _on_mlx(job: Job) -> None:
    """In float32 on a GPU too: what is compared is the export, not the rounding of a device."""
    leave_out_torch()
    from mlx_distill.backends.mlx import device
    from mlx_distill.backends.mlx.loading import load_adapter, load_frozen
    from mlx_distill.backends.mlx.observing import observe as observe_model

    device.prepare_memory()
    with device.explained_allocation("Close other programs, or export with --no-verify."):
        model, _ = load_frozen(job.model, dtype="float32")
        if job.adapter is not None:
            load_adapter(model, job.adapter)
        observe_model(model, job.probe, job.out)


def _first_line() -> bytes:
    """Of standard input, and not a byte more: the rest of it is what `end_with_parent` waits for."""
    line = bytearray()
    while block := os.read(0, 1 << 16):
        line += block
        if block.endswith(b"\n"):
            break
    return bytes(line)


def main() -> int:
    """Do the job of standard input."""
    job = Job.model_validate_json(_first_line())
    end_with_parent()
    try:
        observe(job)
    except (MlxDistillError, OSError) as error:
        sys.stderr.write(f"\n{MARK}{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
