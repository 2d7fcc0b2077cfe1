"""A recipe: the settings of every step in one TOML file, most of them derived from its name."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from mlx_distill.config import (
    CollectConfig,
    CompareConfig,
    FuseConfig,
    JudgeConfig,
    PromptsConfig,
    ReportConfig,
    TrainConfig,
)
from mlx_distill.errors import ConfigError, InputError
from mlx_distill.settings import Settings, parse_settings


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
    "compare.base_url": "{collect.base_url}",
    "compare.fused": "{fuse.out}",
    "compare.out": "visuals/{name}",
    "judge.comparison": "{compare.out}",
    "report.comparison": "{compare.out}",
}


#: Which of these are of no use unless another is derived as well.
_WITH = {"compare.base_url": "compare.teacher"}


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
        tree = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(
            "no such recipe.", path=path, hint="A first one:  mlx-distill demo --show-recipe > recipe.toml"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"not valid TOML: {error}.", path=path) from None
    except RecursionError:
        raise InputError("not valid TOML: nested too deeply.", path=path) from None
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}.", path=path) from None
    for override in overrides:
        _override(tree, override)
    derived = _derive(tree, where=str(path))
    return parse_settings(Recipe, tree, where=str(path), derived=derived)


def split_override(override: str) -> tuple[list[str], str]:
    """The parts of the key and the text of the value of `train.epochs=3` and the like.

    Raises:
        ConfigError: It has no key or no `=`.
    """
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise ConfigError(f"--set {override}: expected KEY=VALUE.", hint="For example:  --set train.epochs=3")
    return parts, text


def _override(tree: dict[str, Any], override: str) -> None:
    (*sections, leaf), text = split_override(override)
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    # Text of several lines can read as more keys than one: then it is just text.
    value = parsed["value"] if parsed.keys() == {"value"} else text
    at = tree
    for section in sections:
        at = at.setdefault(section, {})
        if not isinstance(at, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section.")
    at[leaf] = value


def _derive(tree: dict[str, Any], *, where: str) -> set[str]:
    """Fill in what follows from other keys; returns which keys these are."""
    for section in Recipe.model_fields:
        if section != "name" and not isinstance(tree.setdefault(section, {}), dict):
            raise ConfigError(f"{where}: {section} must be a section: [{section}]")
    derived: set[str] = set()

    def lookup(key: str) -> Any:
        at: Any = tree
        for part in key.split("."):
            at = at.get(part) if isinstance(at, Mapping) else None
        return at

    for key, pattern in _DERIVED.items():
        section, leaf = key.split(".")
        if leaf in tree[section] or _WITH.get(key, key) not in {key, *derived}:
            continue
        source = pattern.strip("{}")
        value = lookup(source) if pattern == f"{{{source}}}" else pattern.format(name=tree.get("name", ""))
        if value is not None:
            tree[section][leaf] = value
            derived.add(key)
    return derived
