"""Groups of settings: typed, frozen, and with one clear sentence for each mistake made in them.

What can be set is in `config`; this is how it is checked, whether it comes from a flag or from a recipe.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, ValidationInfo, field_validator

from mlx_distill.errors import ConfigError

S = TypeVar("S", bound="Settings")

#: As `json_schema_extra` of a field, makes it the positional argument of its command.
ARGUMENT: dict[str, JsonValue] = {"argument": True}

#: How alike a misspelt key and a known one must be, 0 to 1.
_NEAR = 0.6

#: What a value must be, by the name pydantic has for the mistake; braces are filled from its context.
_MUST_BE = {
    "int_parsing": "a whole number",
    "int_parsing_size": "a whole number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "finite",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text, in quotes",
    "path_type": "a path, in quotes",
    "literal_error": "{expected}",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "string_pattern_mismatch": "of the form {pattern}",
}


class Settings(BaseModel):
    """A frozen group of settings that refuses unknown keys, numbers that are none, and empty paths."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_look_alikes(cls: type[Self], value: Any, info: ValidationInfo) -> Any:
        assert info.field_name is not None
        kinds = kinds_of(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and bool not in kinds and (int in kinds or float in kinds):
            raise ValueError("must be a number")  # True would pass for 1.
        if isinstance(value, str) and Path in kinds:
            if not value.strip() or "\0" in value:
                raise ValueError("must be a path")  # "" would pass for the current folder.
            # No shell has done it in a recipe, nor after `--set KEY=`; and nobody wants a folder of this name.
            return Path(value).expanduser() if value.split("/")[0] == "~" else value
        return value


def kinds_of(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation allows, freed of what is annotated to them."""
    if get_origin(annotation) is Annotated:
        return kinds_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return tuple(kind for option in get_args(annotation) for kind in kinds_of(option))
    return (annotation,)


def known_keys(model: type[Settings]) -> Iterator[str]:
    """The dotted keys of a group, sections included, each before what is in it."""
    for name, field in model.model_fields.items():
        yield name
        for kind in kinds_of(field.annotation):
            if isinstance(kind, type) and issubclass(kind, Settings):
                yield from (f"{name}.{key}" for key in known_keys(kind))


def parse_settings(model: type[S], values: Mapping[str, Any], *, where: str, derived: Collection[str] = ()) -> S:
    """Check settings, or say in one sentence a mistake what is wrong with them.

    Args:
        where: Where they come from, for the message.
        derived: Keys whose value was not given but follows from others: a mistake in it is told where it was made.

    Raises:
        ConfigError: Names each key; an unknown one comes with the nearest known one.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        mistakes = _mistakes(model, error)
        told = {key: text for key, text in mistakes.items() if key not in derived} or mistakes
        raise ConfigError(f"{where}: {'; '.join(told.values())}.") from None


def _mistakes(model: type[Settings], error: ValidationError) -> dict[str, str]:
    """One sentence a key. A key that may be of several types has a mistake for each, of which one sentence is made."""
    known = set(known_keys(model))
    sentences: dict[str, str] = {}
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        if problem["type"] == "extra_forbidden":
            key = ".".join(location)
            sentences[key] = _unknown(model, key)
            continue
        while location and ".".join(location) not in known:
            location.pop()
        key = ".".join(location)
        if problem["type"] == "missing":
            sentences[key] = f"{key} is required"
        elif key in sentences:
            sentences[key] += f" or {_must_be(dict(problem)).removeprefix('must be ')}"
        else:
            # A mistake that no key is to blame for, such as two that exclude each other, says itself what it is about.
            of_all = problem["type"] == "value_error" and isinstance(problem["input"], Mapping)
            start = (f"{key}: " if of_all else f"{key} = {_as_written(problem['input'])}: ") if key else ""
            sentences[key] = start + _must_be(dict(problem))
    return sentences


def _must_be(problem: dict[str, Any]) -> str:
    context = {
        name: int(limit) if isinstance(limit, float) and limit.is_integer() else limit
        for name, limit in problem.get("ctx", {}).items()
    }
    if problem["type"] == "value_error":
        return str(context["error"])
    if problem["type"] in _MUST_BE:
        return "must be " + _MUST_BE[problem["type"]].format(**context)
    return str(problem["msg"])


def _as_written(value: Any) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)


def _unknown(model: type[Settings], key: str) -> str:
    """Says that a key is unknown, and which known one is nearest: beside it, or of that name elsewhere."""
    section, _, leaf = key.rpartition(".")
    ranked: list[tuple[float, bool, str]] = []
    for known in known_keys(model):
        beside, _, name = known.rpartition(".")
        likeness = difflib.SequenceMatcher(None, name, leaf).ratio()
        if likeness >= _NEAR and known != section:
            ranked.append((likeness, beside == section, known))
    # The first of the best, as `max` keeps it.
    nearest = max(ranked, key=lambda entry: entry[:2], default=None)
    return f"unknown key {key}" + (f" (did you mean {nearest[2]}?)" if nearest else "")
