"""Which teachers there are. A new one is one file in this package and one line here."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import cast

from mlx_distill.errors import ConfigError
from mlx_distill.teachers.base import Teacher

#: Provider → the module and class that is opened with what follows the colon of a spec. Imported when asked for.
TEACHERS: dict[str, str] = {
    "anthropic": "mlx_distill.teachers.anthropic:AnthropicTeacher",
    "recorded": "mlx_distill.teachers.recorded:RecordedTeacher",
}


def open_teacher(spec: str) -> Teacher:
    """Open the teacher that a spec names; close it after use.

    Args:
        spec: `PROVIDER:NAME`, such as "anthropic:claude-sonnet-4-6" or "recorded:data/starter".

    Raises:
        ConfigError: The provider is unknown, or the spec has no name.
        TeacherError: The teacher cannot be used: no key, for instance.
        InputError: A file of recorded answers is missing or malformed.
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
    module, _, attribute = TEACHERS[provider].partition(":")
    opener = cast(Callable[[str], Teacher], getattr(importlib.import_module(module), attribute))
    return opener(name.strip())
