"""What can be set, once: flags, recipe keys and help all come from the models in this file.

A field's name is the recipe key (`train.batch_size`) and, with dashes, the flag (`--batch-size`); its
description is the help text; its default stands here and nowhere else. `Field(json_schema_extra=ARGUMENT)`
makes a field the positional argument of its command.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from mlx_distill.errors import ConfigError, InputError

DEFAULT_STUDENT = "Qwen/Qwen2.5-1.5B-Instruct"

S = TypeVar("S", bound="Settings")

ARGUMENT: dict[str, JsonValue] = {"argument": True}


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class PromptsConfig(Settings):
    """Expand a prompt file into the prompts to ask."""

    file: Path = Field(
        description="Prompts as TOML (with modifiers), JSONL or plain text, one a line.",
        json_schema_extra=ARGUMENT,
    )
    out: Path | None = Field(None, description="Write the expanded prompts here, as JSONL.")
    modifiers: bool = Field(True, description="Add the variations that the file's modifiers make.")


class CollectConfig(Settings):
    """Ask a teacher every prompt and make a data set of its answers."""

    prompts: Path = Field(description="Prompts: TOML, JSONL or plain text.")
    teacher: str = Field(description="anthropic:MODEL or recorded:PATH.")
    out: Path = Field(description="Folder of the data set, such as data/NAME.")
    system: str | None = Field(None, description="System prompt, sent with every prompt and kept in every row.")
    max_tokens: int = Field(4096, gt=0, description="Token limit of an answer. Answers cut by it are not trained on.")
    concurrency: int = Field(8, gt=0, le=256, description="Requests under way at once.")
    valid_fraction: float = Field(0.1, ge=0, lt=0.5, description="Share of prompt families held out for validation.")
    test_fraction: float = Field(0.1, ge=0, lt=0.5, description="Share of prompt families held out for the final test.")
    accept_terms: bool = Field(
        False,
        description="You have the right to train on this teacher's answers under its provider's terms.",
    )


class TrainConfig(Settings):
    """Train a LoRA adapter on a data set."""

    data: Path = Field(description="Folder with train.jsonl and, if you have them, valid.jsonl and test.jsonl.")
    model: str = Field(DEFAULT_STUDENT, description="Student: folder, Hub id, .gguf file, or smollm2-135m.")
    run: Path = Field(description="Folder of the run, such as adapters/NAME.")
    backend: Literal["mlx"] = Field("mlx", description="What computes.")
    epochs: int = Field(3, gt=0, description="Passes over the training rows.")
    batch_size: int = Field(4, gt=0, description="Rows an optimizer step learns from.")
    micro_batch_size: int | None = Field(
        None, gt=0, description="Rows computed at once; fewer than the batch size saves memory, the update is the same."
    )
    rank: int = Field(8, gt=0, description="Rank of the LoRA matrices.")
    scale: float = Field(2.0, gt=0, description="Factor of the LoRA update (alpha / rank).")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the LoRA matrices.")
    layers: int | Literal["all"] = Field(
        16, description="Transformer layers that get an adapter, counted from the last; or all."
    )
    optimizer: Literal["adamw", "adam"] = Field("adamw", description="Optimizer.")
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate after warm-up.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of all steps over which the learning rate rises.")
    final_learning_rate: float = Field(0.1, ge=0, le=1, description="Where the schedule ends, as a share of the peak.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay.")
    grad_clip: float | None = Field(
        1.0, gt=0, description="Largest gradient norm; longer gradients are shortened to it."
    )
    max_length: int = Field(
        2048, gt=1, description="Rows longer than this many tokens are left out and counted, never cut."
    )
    seed: int = Field(0, ge=0, description="Seed of the adapter's start, the order of rows and dropout.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the frozen weights: auto is the model's own on a GPU, float32 on a CPU."
    )
    checkpoint_every: int = Field(
        50, gt=0, description="Optimizer steps between checkpoints; every epoch's end makes one too."
    )
    keep_checkpoints: int = Field(2, gt=0, description="Newest checkpoints to keep.")


class FuseConfig(Settings):
    """Merge an adapter into its base model."""

    run: Path = Field(description="Folder of the training run.", json_schema_extra=ARGUMENT)
    out: Path | None = Field(None, description="Folder of the fused model.  [default: RUN/fused]")


class CompareConfig(Settings):
    """Let teacher, base and distilled student answer held-out prompts."""

    run: Path = Field(description="Folder of the training run.", json_schema_extra=ARGUMENT)
    prompts: Path = Field(description="Held-out prompts: TOML, JSONL or plain text.")
    teacher: str | None = Field(
        None, description="anthropic:MODEL or recorded:PATH; without it, base and student alone."
    )
    max_tokens: int = Field(1024, gt=0, description="One token budget for all contenders.")
    out: Path | None = Field(None, description="Folder of the comparison.  [default: visuals/NAME of the run]")
    fused: Path | None = Field(None, description="Folder of the fused model.  [default: RUN/fused]")
    batch_size: int = Field(8, gt=0, description="Prompts a local model answers at once.")
    concurrency: int = Field(4, gt=0, le=256, description="Requests to a teacher under way at once.")


class JudgeConfig(Settings):
    """Score the answers of a comparison."""

    comparison: Path = Field(description="Folder of the comparison.", json_schema_extra=ARGUMENT)
    judge: str = Field("rubric", description="rubric (offline) or anthropic:MODEL.")
    concurrency: int = Field(4, gt=0, le=256, description="Requests to a judge under way at once.")


class ReportConfig(Settings):
    """Draw the charts and write the report of a comparison."""

    comparison: Path = Field(description="Folder of the comparison.", json_schema_extra=ARGUMENT)


class Recipe(Settings):
    """The whole line, from prompts to report."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Names the folders under data/, adapters/ and visuals/."
    )
    prompts: PromptsConfig
    collect: CollectConfig
    train: TrainConfig
    fuse: FuseConfig
    compare: CompareConfig
    judge: JudgeConfig
    report: ReportConfig


#: Keys of a recipe that follow from its name or from another step, unless given.
_DERIVED: dict[str, str] = {
    "prompts.out": "data/{name}/prompts.jsonl",
    "collect.prompts": "{prompts.out}",
    "collect.out": "data/{name}",
    "train.data": "{collect.out}",
    "train.run": "adapters/{name}",
    "fuse.run": "{train.run}",
    "compare.run": "{train.run}",
    "compare.teacher": "{collect.teacher}",
    "compare.fused": "{fuse.out}",
    "compare.out": "visuals/{name}",
    "judge.comparison": "{compare.out}",
    "report.comparison": "{compare.out}",
}


def load_recipe(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `KEY=VALUE` overrides to it.

    Args:
        path: A TOML file.
        overrides: `train.epochs=3` and the like; values are read as TOML, else taken as text.

    Raises:
        InputError: The file is missing or is not TOML.
        ConfigError: A key is unknown (the nearest known one is named), missing, or its value cannot be.
    """
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            "no such recipe.", path=path, hint="A first one:  mlx-distill demo --show-recipe > recipe.toml"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not valid TOML: {error}", path=path) from None
    for override in overrides:
        _override(tree, override)
    _derive(tree)
    return parse_settings(Recipe, tree, where=str(path))


def _override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: expected KEY=VALUE.", hint="For example:  --set train.epochs=3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, leaf = key.split(".")
    at = tree
    for section in sections:
        at = at.setdefault(section, {})
        if not isinstance(at, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section.")
    at[leaf] = value


def _derive(tree: dict[str, Any]) -> None:
    for section in Recipe.model_fields:
        if section != "name" and not isinstance(tree.setdefault(section, {}), dict):
            raise ConfigError(f"{section} must be a section: [{section}]")

    def lookup(key: str) -> Any:
        at: Any = tree
        for part in key.split("."):
            at = at.get(part) if isinstance(at, Mapping) else None
        return at

    for key, pattern in _DERIVED.items():
        section, leaf = key.split(".")
        if leaf in tree[section]:
            continue
        source = pattern.strip("{}")
        value = lookup(source) if pattern == f"{{{source}}}" else pattern.format(name=tree.get("name", ""))
        if value is not None:
            tree[section][leaf] = value


def parse_settings(model: type[S], values: Mapping[str, Any], *, where: str) -> S:
    """Validate settings, or say in one sentence a problem what is wrong with them.

    Raises:
        ConfigError: Names each key; an unknown one comes with the nearest known one.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        lines = [_explain(model, dict(problem)) for problem in error.errors()]
        raise ConfigError(f"{where}: " + "; ".join(dict.fromkeys(lines))) from None


def _explain(model: type[Settings], problem: dict[str, Any]) -> str:
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        known = known_keys(model)
        near = difflib.get_close_matches(".".join(location), known, n=1, cutoff=0.5)
        siblings = [k.rsplit(".", 1)[-1] for k in known]
        near = near or [known[siblings.index(n)] for n in difflib.get_close_matches(location[-1], siblings, n=1)]
        return f"unknown key {'.'.join(location)}" + (f" (did you mean {near[0]}?)" if near else "")
    key = ".".join(part for part in location if part.isidentifier())
    if problem["type"] == "missing":
        return f"{key} is required"
    return f"{key} = {problem['input']!r}: {problem['msg'].lower()}"


def known_keys(model: type[Settings]) -> list[str]:
    """The dotted keys of a settings model."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        nested = next((k for k in kinds if isinstance(k, type) and issubclass(k, Settings)), None)
        keys += [f"{name}.{key}" for key in known_keys(nested)] if nested else [name]
    return keys
