"""`mlx-distill prompts`."""

from __future__ import annotations

from collections import Counter

from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import PromptsConfig
from mlx_distill.progress import Progress


@make_command(
    PromptsConfig,
    examples="""
    mlx-distill prompts data/prompts/coding.toml
    mlx-distill prompts data/prompts/coding.toml --out prompts.jsonl
    mlx-distill prompts my-prompts.txt --json
    mlx-distill prompts my-tasks.toml
    """,
    keeps="Nothing was written; an older output file is as it was.",
)
def command(config: PromptsConfig, progress: Progress) -> Summary:
    """Expand a prompt file into the prompts to ask."""
    from mlx_distill.evaluation.tasks import is_task_file, read_prompts
    from mlx_distill.prompts import write_prompts

    prompts = read_prompts(config.file, modifiers=config.modifiers)
    tasks = is_task_file(config.file)
    fields = Counter(prompt.field for prompt in prompts)
    families = Counter(prompt.family for prompt in prompts)
    family_fields = {prompt.family: prompt.field for prompt in prompts}
    modifiers = Counter(prompt.modifier for prompt in prompts if prompt.modifier)
    if config.out is not None:
        write_prompts(config.out, prompts)
    data = {
        "prompts": len(prompts),
        "variations": modifiers.total(),
        "families": dict(families),
        "fields": dict(fields),
        "modifiers": dict(modifiers),
        "duplicates": 0,  # They are refused on reading.
        "tasks": tasks,
        "out": None if config.out is None else str(config.out),
    }
    width = max(map(len, fields))
    lines = [
        f"{len(prompts)} prompts in {len(families)} families, {modifiers.total()} of them variations; no duplicates.",
        "",
        f"{'field':<{width}}  families  prompts",
    ]
    for name, count in fields.items():
        bases = sum(1 for field in family_fields.values() if field == name)
        lines.append(f"{name:<{width}}  {bases:>8}  {count:>7}")
    if modifiers:
        lines += ["", "modifiers: " + ", ".join(f"{name} {count}" for name, count in modifiers.items())]
    if tasks:
        lines += ["", f"Their hidden tests stay where they are:  mlx-distill collect --prompts {config.file} --verify"]
    if config.out is not None:
        lines += ["", f"Written to {config.out}."]
    return Summary(data, lines)
