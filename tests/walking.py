"""A whole small project, and what tests of the walk through a recipe look at."""

from __future__ import annotations

import json
from pathlib import Path

from mlx_distill.pipeline import walk
from mlx_distill.progress import Progress
from mlx_distill.recipe import Recipe, load_recipe

PROMPTS = 14
HELD_OUT = ("Sort a list.", "Reverse a string.")

ALL = ("prompts", "collect", "train", "fuse", "compare", "judge", "report")


def make_project(folder: Path, model: Path) -> Path:
    """Prompts, their recorded answers and a recipe that a tiny model walks in seconds."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = [f"Write function number {number}." for number in range(PROMPTS)]
    answers = {prompt: f"def f{at}():\n    return {at}\n" for at, prompt in enumerate([*prompts, *HELD_OUT])}
    rows = [{"prompt": prompt, "answer": answer} for prompt, answer in answers.items()]
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    (folder / "held.txt").write_text("\n".join(HELD_OUT) + "\n", encoding="utf-8")
    (folder / "recipe.toml").write_text(
        f"""
name = "small"
[prompts]
file = "prompts.txt"
[collect]
teacher = "recorded:answers.jsonl"
valid_fraction = 0.2
test_fraction = 0.2
[train]
model = {json.dumps(str(model))}
epochs = 1
batch_size = 2
rank = 2
layers = 2
learning_rate = 5e-3
max_length = 128
checkpoint_every = 1
[compare]
prompts = "held.txt"
max_tokens = 4
""",
        encoding="utf-8",
    )
    return folder


class Listener(Progress):
    """Keeps what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


def recipe(*overrides: str) -> Recipe:
    """The recipe of the current folder."""
    return load_recipe(Path("recipe.toml"), overrides)


def done(*overrides: str, force: tuple[str, ...] = (), progress: Progress | None = None) -> list[str]:
    """Walk; the steps that were not skipped."""
    outcomes = walk(recipe(*overrides), force=force, progress=progress or Progress())
    assert tuple(outcome.step for outcome in outcomes) == ALL
    return [outcome.step for outcome in outcomes if outcome.status == "done"]


def snapshot(*folders: str) -> dict[str, bytes]:
    """Every file below some folders."""
    return {
        str(path): path.read_bytes() for name in folders for path in sorted(Path(name).rglob("*")) if path.is_file()
    }
