"""The command lines that make the same report again."""

from __future__ import annotations

import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_distill.config import CompareConfig, TrainConfig
from mlx_distill.errors import InputError
from mlx_distill.layout import DataFolder
from mlx_distill.logit_cache import read_logits_record
from mlx_distill.records import CONTENDERS, ComparisonRecord
from mlx_distill.report.evidence import Evidence
from mlx_distill.run_records import RunRecord

#: Stands for a prompt file that the records do not name.
UNKNOWN = "FILE"


def commands_to_repeat(evidence: Evidence) -> list[str]:
    """One line a step, as far as the records tell it. What a default says is left out."""
    root = str(evidence.folder.root)
    lines: list[list[str]] = []
    if evidence.run:
        data = str(evidence.run.config.get("data", ""))
        if (manifest := evidence.manifest) and data:
            prompts = DataFolder(Path(data)).prompts
            collect = ["collect", "--prompts", str(prompts) if prompts.exists() else UNKNOWN]
            collect += ["--teacher", manifest.teacher, "--out", data]
            lines.append([*collect, *(["--accept-terms"] if manifest.terms.accepted else [])])
        lines += _logits(evidence.run, data)
        lines.append(["train", *_flags(evidence.run.config)])
        lines.append(["fuse", str(evidence.run_path)])
    if record := evidence.record:
        compare = ["compare", record.run]
        if record.prompts or not record.evals:
            compare += ["--prompts", record.prompts or UNKNOWN]
        if record.evals:
            compare += ["--eval", ",".join(record.evals)]
        if record.teacher:
            compare += ["--teacher", record.teacher]
        if others := [f"{name}={model}" for name, model in record.models.items() if name not in CONTENDERS]:
            compare += ["--others", ",".join(others)]
        lines.append([*compare, *_recorded(record), "--max-tokens", str(record.max_tokens), "--out", root])
    paired = {duel.judge for duel in evidence.duels}
    for name in dict.fromkeys([*evidence.judges, *sorted(paired)]):
        lines.append(["judge", root, "--judge", name, *(["--pairwise"] if name in paired else [])])
    rivals = ",".join(str(rival.root) for rival in evidence.rivals)
    lines.append(["report", root, *(["--against", rivals] if rivals else [])])
    return [shlex.join(["mlx-distill", *line]) for line in lines]


def _logits(run: RunRecord, data: str) -> list[list[str]]:
    """How a teacher's logits were written, where the run learned from such."""
    folder = run.config.get("teacher_logits")
    if folder is None or run.distilled_from is None:
        return []
    line = ["logits", "--data", data, "--teacher", f"mlx:{run.distilled_from}", "--out", str(folder)]
    with suppress(InputError):
        record = read_logits_record(Path(str(folder)))
        line += ["--top-k", str(record.top_k)]
    return [line]


def _recorded(record: ComparisonRecord) -> list[str]:
    """How the answers were made, where that is not the default."""
    flags: list[str] = []
    for name in ("samples", "temperature", "seed", "repetition_penalty"):
        value = getattr(record, name)
        if value != CompareConfig.model_fields[name].default:
            flags += ["--" + name.replace("_", "-"), f"{value:g}"]
    return flags


def _flags(config: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, field in TrainConfig.model_fields.items():
        value = config.get(name)
        if value is None or (not field.is_required() and value == field.default and name != "model"):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            flags += [f"--{flag}", str(value)]
    return flags
