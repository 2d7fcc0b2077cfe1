"""The command lines that make the same report again."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from mlx_distill.config import TrainConfig
from mlx_distill.layout import DataFolder
from mlx_distill.report.evidence import Evidence

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
        lines.append(["train", *_flags(evidence.run.config)])
        lines.append(["fuse", str(evidence.run_path)])
    if record := evidence.record:
        compare = ["compare", record.run, "--prompts", record.prompts or UNKNOWN]
        if record.teacher:
            compare += ["--teacher", record.teacher]
        if record.repetition_penalty != 1:
            compare += ["--repetition-penalty", f"{record.repetition_penalty:g}"]
        lines.append([*compare, "--max-tokens", str(record.max_tokens), "--out", root])
    lines += [["judge", root, "--judge", judge] for judge in evidence.judges]
    lines.append(["report", root])
    return [shlex.join(["mlx-distill", *line]) for line in lines]


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
