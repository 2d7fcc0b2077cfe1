"""What the run was made with, as rows of a table."""

from __future__ import annotations

from mlx_distill.report.evidence import Evidence
from mlx_distill.report.wording import count, duration, gigabytes


def settings_of(evidence: Evidence) -> list[tuple[str, str]]:
    """(name, value) of all that is known, from the student to the comparison."""
    rows: list[tuple[str, str | None]] = []
    run, manifest, record = evidence.run, evidence.manifest, evidence.record
    if run:
        config = run.config
        rows += [
            ("Student", run.model.name + (f" at {run.model.revision[:12]}" if run.model.revision else "")),
            ("Student's licence", run.model.licence),
            ("Trainable parameters", count(run.trainable_parameters)),
            ("LoRA", f"rank {config.get('rank')}, scale {config.get('scale')}, layers {config.get('layers')}"),
            ("Optimizer", f"{config.get('optimizer')}, {config.get('learning_rate')}, {config.get('schedule')}"),
            ("Epochs, batch size", f"{run.epochs}, {config.get('batch_size')}"),
            ("Seed", str(config.get("seed"))),
            ("Device", f"{run.backend}: {run.device}"),
            ("Training time", duration(run.seconds) if run.seconds is not None else None),
            ("Training speed", f"{run.tokens_per_second:,.0f} tokens/s" if run.tokens_per_second else None),
            ("Peak memory", gigabytes(run.peak_memory_bytes) if run.peak_memory_bytes else None),
            ("Training rows", ", ".join(f"{name} {split.rows}" for name, split in run.splits.items())),
        ]
    if manifest:
        rows += [
            ("Teacher", ", ".join((manifest.teacher, *manifest.teacher_models))),
            ("Teacher's terms", f"{manifest.terms.licence}. {manifest.terms.summary}"),
            (f"{manifest.unit.capitalize()} asked, answered", f"{manifest.asked}, {manifest.answered}"),
            ("Answers asked for to a prompt", str(manifest.samples) if manifest.samples > 1 else None),
            ("Temperature of these answers", None if manifest.temperature is None else f"{manifest.temperature:g}"),
            ("Left out of training", ", ".join(f"{d.reason} {d.count}" for d in manifest.dropped) or None),
            ("Collection time", duration(manifest.collection_seconds)),
        ]
    if record:
        penalised = record.repetition_penalty != 1
        rows += [
            ("Held-out prompts", f"{record.prompts or 'file'} (SHA-256 {record.prompts_sha256[:12]}…)"),
            ("Tasks", ", ".join(record.evals) or None),
            ("Answers of a local model to a prompt", count(record.samples) if record.samples > 1 else None),
            ("Temperature", f"{record.temperature:g}, seed {record.seed}" if record.temperature else "0 (greedy)"),
            ("Token budget of an answer", count(record.max_tokens)),
            ("Repetition penalty", f"{record.repetition_penalty:g}, local models alike" if penalised else None),
            ("Compared on", record.device),
            ("Compared at", record.created),
        ]
    if run:
        rows.append(("mlx-distill", run.version))
    return [(name, value) for name, value in rows if value]
