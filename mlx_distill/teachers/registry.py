"""Which teachers there are. A new one is one file in this package and one line here."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable
from typing import cast

from mlx_distill.errors import ConfigError
from mlx_distill.teachers.base import Teacher

#: Provider → the module and class that is opened with what follows the colon of a spec. Imported when asked for.
TEACHERS: dict[str, str] = {
    "anthropic": "mlx_distill.teachers.anthropic:AnthropicTeacher",
    "openai": "mlx_distill.teachers.openai:OpenAITeacher",
    "mlx": "mlx_distill.teachers.mlx:MlxTeacher",
    "recorded": "mlx_distill.teachers.recorded:RecordedTeacher",
}

#: Those that speak to a server the user can name.
TAKES_BASE_URL = frozenset({"openai"})

#: Those that cannot be told a temperature → what can be done instead.
NO_TEMPERATURE = {
    "anthropic": "Leave --temperature away: its answers are drawn, so --samples alone gives several.",
    "recorded": "Leave --temperature away.",
}

#: Those that have one answer to a prompt.
ONE_ANSWER = frozenset({"recorded"})

#: Those that give the same answer each time unless they are told a temperature.
GREEDY = frozenset({"mlx"})


def open_teacher(spec: str, *, base_url: str | None = None) -> Teacher:
    """Open the teacher that a spec names; close it after use.

    Args:
        spec: `PROVIDER:NAME`, such as "anthropic:claude-sonnet-4-6", "mlx:Qwen/Qwen2.5-7B-Instruct" or
            "recorded:data/starter".
        base_url: Of the server to ask, for a teacher behind an OpenAI-compatible one.

    Raises:
        ConfigError: The provider is unknown, the spec has no name, or a URL is given that it has no use for.
        TeacherError: The teacher cannot be used: no key, for instance.
        DependencyError: Its SDK is an extra that is not installed.
        InputError: A file of recorded answers is missing or malformed.
        ModelError: A local model cannot be found.
    """
    provider, _, name = spec.partition(":")
    if provider not in TEACHERS:
        near = difflib.get_close_matches(provider, TEACHERS, n=1)
        guess = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"unknown teacher {spec!r}.{guess}", hint=f"Known: {', '.join(f'{known}:NAME' for known in TEACHERS)}."
        )
    if not name.strip():
        raise ConfigError(
            f"teacher {spec!r} names nothing after the colon.",
            hint="For example anthropic:claude-sonnet-4-6, or recorded:data/starter.",
        )
    if base_url is not None and provider not in TAKES_BASE_URL:
        raise ConfigError(
            f"teacher {spec!r} takes no base URL.",
            hint="Leave --base-url out, or name the model of that server as openai:MODEL.",
        )
    module, _, attribute = TEACHERS[provider].partition(":")
    opener = cast(Callable[..., Teacher], getattr(importlib.import_module(module), attribute))
    return opener(name.strip()) if base_url is None else opener(name.strip(), base_url=base_url)


def base_urls(specs: Iterable[str], base_url: str | None, *, what: str) -> dict[str, str | None]:
    """Which of several models are behind a server that was named once for all.

    Args:
        specs: As for `open_teacher`.
        base_url: Of the server; None where none was named.
        what: They are, in the plural.

    Raises:
        ConfigError: A server was named, and none of them has a use for it.
    """
    found = {spec: base_url if spec.partition(":")[0] in TAKES_BASE_URL else None for spec in specs}
    if base_url is not None and base_url not in found.values():
        raise ConfigError(
            f"none of the {what} takes a base URL: {', '.join(found) or 'there are none'}.",
            hint="Leave --base-url out, or name the model of that server as openai:MODEL.",
        )
    return found


def check_sampling(spec: str, *, samples: int, temperature: float | None) -> None:
    """Refuse what a teacher of this kind cannot be asked for. Opens and sends nothing.

    Args:
        spec: Of a teacher. Of one that is not in the table nothing is known, and nothing is refused.
        samples: Answers to each prompt.
        temperature: None leaves it to the teacher.

    Raises:
        ConfigError: It takes no temperature, or its answers would all be the same.
    """
    provider = spec.partition(":")[0]
    if temperature is not None and provider in NO_TEMPERATURE:
        raise ConfigError(f"teacher {spec!r} takes no temperature.", hint=NO_TEMPERATURE[provider])
    if samples == 1:
        return
    if provider in ONE_ANSWER:
        raise ConfigError(f"teacher {spec!r} has one answer to a prompt, not {samples}.", hint="Leave --samples away.")
    if temperature == 0 or (temperature is None and provider in GREEDY):
        raise ConfigError(
            f"the {samples} greedy answers of teacher {spec!r} to a prompt would all be the same.",
            hint="Draw them, for example with  --temperature 0.8",
        )
