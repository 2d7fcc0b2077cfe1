"""What all contenders are asked: prompts of a file, and tasks with hidden tests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlx_distill.config import CompareConfig
from mlx_distill.errors import InputError
from mlx_distill.evaluation import EvalTask, as_prompts, load_human_eval, load_tasks
from mlx_distill.evaluation.tasks import BUILTIN
from mlx_distill.layout import bundled, find_input
from mlx_distill.prompts import fold, load_prompts
from mlx_distill.records import Prompt

HUMAN_EVAL = "human-eval"


@dataclass(frozen=True)
class Questions:
    """What is asked.

    Attributes:
        prompts: All, those of the file first.
        tasks: By the id of their prompt.
    """

    prompts: tuple[Prompt, ...]
    tasks: dict[str, EvalTask]


def sets_of(text: str) -> tuple[str, ...]:
    """The names in a comma-separated list, each once."""
    return tuple(dict.fromkeys(filter(None, map(str.strip, text.split(",")))))


def task_files(text: str) -> list[Path]:
    """The files that decide what the named sets hold; what a package brings is not among them."""
    files: list[Path] = []
    for name in sets_of(text):
        place = bundled("eval") if name == BUILTIN else None if name == HUMAN_EVAL else find_input(Path(name))
        if place is not None:
            files += sorted(place.glob("*.toml")) if place.is_dir() else [place]
    return files


def questions_of(config: CompareConfig) -> Questions:
    """Read them all.

    A task whose prompt stands in the file as well is asked once.

    Raises:
        InputError: A file is missing or malformed, or two of them give one id to different texts.
        DependencyError: HumanEval is wanted, and its package is not installed.
    """
    asked = {prompt.id: prompt for prompt in (load_prompts(config.prompts) if config.prompts else [])}
    tasks: dict[str, EvalTask] = {}
    for name in sets_of(config.eval):
        found = load_tasks() if name == BUILTIN else load_human_eval() if name == HUMAN_EVAL else load_tasks(Path(name))
        _add(found, asked, tasks, name)
    return Questions(tuple(asked.values()), tasks)


def _add(found: Iterable[EvalTask], asked: dict[str, Prompt], tasks: dict[str, EvalTask], name: str) -> None:
    for task, prompt in zip(found := list(found), as_prompts(found), strict=True):
        known = asked.setdefault(prompt.id, prompt)
        if prompt.id in tasks or fold(known.text) != fold(prompt.text):
            raise InputError(
                f"--eval {name}: the id {prompt.id} is that of another prompt, too.",
                hint="Ids tell answers apart: rename one of the two.",
            )
        tasks[prompt.id] = task
