"""The step `fuse`: an adapter becomes part of the weights, and the result is held against base and adapter.

The model that was written is loaded again from the disk and must say, on rows that were held out of training, what the
base says with the adapter on it. One that does not is not kept.

Reads: adapters/RUN/{adapters.safetensors,adapter_config.json,run.json}, the base model and the data set's rows.
Writes: adapters/RUN/fused/, a whole model in Hugging Face layout; then the figures of the check into run.json.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from mlx_distill import layout
from mlx_distill.agreement import Observation, Probe, agreement
from mlx_distill.config import FuseConfig
from mlx_distill.errors import InputError, ModelError
from mlx_distill.models.folder import companions, read_config
from mlx_distill.probing import make_probe
from mlx_distill.progress import SILENT, Progress
from mlx_distill.run_records import Agreement, FuseCheck, RunRecord
from mlx_distill.runs import FusedRecord, read_run, require_own_folder, resolve_base

if TYPE_CHECKING:
    from mlx_distill.backends.mlx.fusing import Fused

#: Raised when a change makes the same adapter give another fused model, or another record of it.
CODE_FORMAT = 3


@dataclass(frozen=True)
class Tolerance:
    """How far a fused model may be from base and adapter.

    Attributes:
        kl: Mean divergence, in nats a position.
        loss: Difference of the losses either way, in nats.
    """

    kl: float
    loss: float


#: By the type that a fused matrix is rounded to, which moves each weight by less than 2⁻²³, 2⁻¹⁰ or 2⁻⁷ of it.
#: SmolLM2-135M with all its matrices adapted, computed in float32: divergence 3e-6 in float16, 7e-5 in bfloat16.
TOLERANCES: Mapping[str, Tolerance] = {
    "float32": Tolerance(1e-6, 1e-4),
    "float16": Tolerance(1e-4, 1e-2),
    "bfloat16": Tolerance(1e-3, 2e-2),
}

#: On a GPU, where a model computes in its own type: each of its sums is rounded in another order, and float32 may be
#: multiplied in TF32, whose significand is as short as float16's.
GPU_TOLERANCES: Mapping[str, Tolerance] = {
    "float32": Tolerance(1e-3, 2e-2),
    "float16": Tolerance(1e-3, 2e-2),
    "bfloat16": Tolerance(1e-2, 1e-1),
}


def fused_folder(config: FuseConfig) -> Path:
    """Where the fused model goes."""
    return config.out or layout.RunFolder(config.run).fused


def fuse(config: FuseConfig, progress: Progress = SILENT) -> FusedRecord:
    """Merge a run's adapter into its base model, and check the result.

    Raises:
        InputError: The run is missing or not finished, or there is no data set where one is named.
        FolderError: The target holds something that is not a fused model of ours, or another process uses the run.
        ModelError: Base and adapter do not belong together, the adapter is damaged, or the fused model does not say
            what they say. What was at the target before is there still.
        ResourceError: Not enough disk or memory.
    """
    from mlx_distill.backends.mlx.fusing import require_adapter

    run = read_run(config.run)
    files = layout.RunFolder(config.run)
    out = fused_folder(config)
    require_own_folder(out, layout.fused_record(out), "a fused model")
    data = _data(config, run)
    require_adapter(config.run)
    base = resolve_base(config.run, run, progress)
    with layout.lock(config.run):
        layout.sweep(config.run)
        probe = make_probe(Path(base.path), data, max_length=run.config.get("max_length"), progress=progress)
        layout.require_disk(out.parent, _disk(Path(base.path), probe), what="The fused model")
        with layout.atomic_folder(out) as temporary:
            fused, check = _fuse_checked(config, base.name, Path(base.path), probe, temporary, progress)
            for file in companions(Path(base.path)):
                shutil.copyfile(file, temporary / file.name)
            record = FusedRecord(
                run=str(config.run),
                adapter_sha256=layout.file_sha256(files.adapter),
                base=run.model.spec,
                base_revision=run.model.revision,
                licence=run.model.licence,
                layers=fused.layers,
                bytes=sum(f.stat().st_size for f in temporary.glob("*.safetensors")),
                check=check,
            )
            layout.write_text(
                layout.fused_record(temporary), record.model_dump_json(indent=2, exclude_none=True) + "\n"
            )
        # Last: where this fails, or the process is killed before it, the same command writes it.
        _note(files, check)
    return record


def _data(config: FuseConfig, run: RunRecord) -> Path | None:
    """The data set whose rows are read. That of the run may be gone; one that is named may not."""
    if config.data is None:
        return Path(run.config["data"]) if "data" in run.config else None
    if not any(layout.DataFolder(config.data).split(name).is_file() for name in layout.SPLITS):
        raise InputError(
            "there is no data set: no test.jsonl, valid.jsonl or train.jsonl.",
            path=config.data,
            hint="Leave --data out to take the run's own.",
        )
    return config.data


def _disk(base: Path, probe: Probe) -> int:
    """Bytes that model and observations take, but for what dequantizing adds."""
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    words = read_config(base).get("vocab_size")
    observed = 4 * probe.positions * words if isinstance(words, int) else 0
    return int(size * 1.05) + 2 * observed


def _note(files: layout.RunFolder, check: FuseCheck) -> None:
    """Write the figures into the run's record."""
    before = read_run(files.root)
    record = before.model_copy(update={"fusing": check})
    if record != before:
        layout.write_text(files.record, record.model_dump_json(indent=2, exclude_none=True) + "\n")


def _fuse_checked(
    config: FuseConfig, name: str, base: Path, probe: Probe, out: Path, progress: Progress
) -> tuple[Fused, FuseCheck]:
    """Write weights and configuration that say what base and adapter say.

    Raises:
        ModelError: They do not, and there is no other way.
    """
    from mlx_distill.backends.mlx.fusing import fuse_into
    from mlx_distill.backends.mlx.observing import observe_folder

    with TemporaryDirectory(dir=out, prefix=".check-") as folder:
        observed = Path(folder)
        with progress.task(f"Reading {len(probe.rows)} rows with base and adapter"):
            observe_folder(base, config.run, probe, observed / "reference")
        reference = Observation.load(observed / "reference")

        def attempt(*, dequantize: bool) -> tuple[Fused, FuseCheck]:
            with progress.task(f"Fusing {name}"):
                # What an attempt before this one left.
                for file in out.glob("model*"):
                    file.unlink()
                fused = fuse_into(base, config.run, out, dequantize=dequantize)
            place = observed / "fused"
            with progress.task("Reading them with the fused model"):
                observe_folder(out, None, probe, place)
            found = agreement(probe, reference, Observation.load(place))
            shutil.rmtree(place)
            return fused, judge(fused, probe, found, dequantize)

        fused, check = attempt(dequantize=config.quantized_base == "dequantize")
        if check.passed:
            return fused, check
        if check.way == "requantized" and check.agreement.finite:
            if config.quantized_base == "requantize":
                progress.say(f"Quantized again, it says something else than base and adapter: {figures(check)}.")
                return fused, check
            progress.say(
                f"Quantized again, it would say something else than base and adapter: {figures(check)}. "
                f"The {fused.quantized} layers that the adapter changed are written dequantized instead."
            )
            refused = check.agreement
            fused, check = attempt(dequantize=True)
            if check.passed:
                return fused, check.model_copy(update={"refused": refused})
    raise _refusal(config, check)


def judge(fused: Fused, probe: Probe, found: Agreement, dequantize: bool) -> FuseCheck:
    """Hold what was found against the tolerance."""
    from mlx_distill.backends.mlx.device import on_gpu

    limit = (GPU_TOLERANCES if on_gpu() else TOLERANCES)[fused.dtype]
    within = found.kl <= limit.kl and abs(found.loss - found.loss_reference) <= limit.loss
    return FuseCheck(
        way="plain" if not fused.quantized else "dequantized" if dequantize else "requantized",
        dtype=fused.dtype,
        tolerance_kl=limit.kl,
        tolerance_loss=limit.loss,
        passed=found.finite and within,
        source=probe.source,
        rows=len(probe.rows),
        agreement=found,
    )


def figures(check: FuseCheck) -> str:
    """What was found and what is passed, in words."""
    found = check.agreement
    parts = [
        f"KL {found.kl:.2g} nats (at most {check.tolerance_kl:g})",
        f"loss {found.loss:.4f} for {found.loss_reference:.4f} (at most {check.tolerance_loss:g} apart)",
        f"logits {found.largest_difference:.2g} apart at most, {found.mean_difference:.2g} on average",
    ]
    if found.greedy_agreement is not None:
        parts.append(f"{found.greedy_agreement:.0%} of the greedy tokens alike")
    return ", ".join(parts)


def _refusal(config: FuseConfig, check: FuseCheck) -> ModelError:
    found = check.agreement
    if not found.finite:
        return ModelError(
            f"{config.run}: base and adapter, or the model fused from them, give logits that are no numbers.",
            hint="Training may have diverged. Train again with a lower --learning-rate.",
        )
    return ModelError(
        f"{config.run}: the fused model does not say what base and adapter say: {figures(check)}. It was not kept.",
        hint="The adapter works without it: mlx_lm.generate --adapter-path; and please report this.",
    )
