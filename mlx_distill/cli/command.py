"""Turns a settings model and a function into a click command.

Flags come from the fields of the settings (see `config`); their values are checked by the settings
themselves. Errors of ours become one message and exit code 1; Ctrl-C becomes 130 with what was kept.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from mlx_distill.cli import exits
from mlx_distill.cli.console import Summary, TerminalProgress
from mlx_distill.errors import ConfigError, MlxDistillError
from mlx_distill.models.tokenizer import leave_out_torch
from mlx_distill.progress import Progress
from mlx_distill.settings import Settings, kinds_of, parse_settings

S = TypeVar("S", bound=Settings)

Body = Callable[[Any, Progress], Summary]


def command(
    settings: type[Settings], *, examples: str, keeps: str | Callable[[Any], str]
) -> Callable[[Body], click.Command]:
    """Make a command of a function `(settings, progress) -> Summary`.

    Args:
        settings: Its flags and arguments.
        examples: Command lines, one a line, shown in its help.
        keeps: What an interruption leaves and how to go on: a sentence, or what makes it of the settings.
    """

    def decorate(body: Body) -> click.Command:
        def callback(**values: Any) -> None:
            as_json = values.pop("as_json")
            given = {key: value for key, value in values.items() if value is not None}
            try:
                config = parse_settings(settings, given, where="usage")
            except ConfigError as error:
                raise click.UsageError(_as_flags(error.message.removeprefix("usage: "), settings)) from None
            if getattr(config, "backend", None) != "torch":
                leave_out_torch()
            run_guarded(
                lambda: body(config, TerminalProgress()),
                as_json=as_json,
                keeps=keeps if isinstance(keeps, str) else lambda: keeps(config),
            )

        parameters = [_parameter(name, field) for name, field in settings.model_fields.items()]
        parameters.append(json_option())
        return click.Command(
            body.__name__.rstrip("_").replace("_", "-"),
            callback=callback,
            params=parameters,
            help=(body.__doc__ or settings.__doc__ or "").strip(),
            epilog=example_block(examples),
        )

    return decorate


def json_option() -> click.Option:
    """The `--json` flag that every command has."""
    return click.Option(
        ["--json", "as_json"], is_flag=True, help="Print one JSON object on standard output instead of the summary."
    )


def example_block(examples: str) -> str:
    """Command lines as the end of a command's help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line.strip()}" for line in examples.strip().splitlines())


def run_guarded(body: Callable[[], Summary], *, as_json: bool, keeps: str | Callable[[], str]) -> None:
    """Run a command's body, print its summary, and turn errors into messages and exit codes."""
    # That there is no torch is as it should be.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        # Standard output is for the result alone, whatever a library prints.
        with exits.terminable(), redirect_stdout(sys.stderr):
            summary = body()
        summary.print(as_json=as_json)
        if summary.failed:
            sys.exit(exits.FAILED)
    except KeyboardInterrupt:
        click.echo(f"\nInterrupted. {keeps if isinstance(keeps, str) else keeps()}", err=True)
        sys.exit(exits.INTERRUPTED)
    except BrokenPipeError:
        raise  # Nobody reads on: click ends the process without a word.
    except (MlxDistillError, OSError, ImportError, MemoryError, RecursionError) as error:
        click.echo(f"Error: {_message(error)}", err=True)
        sys.exit(exits.FAILED)


def _message(error: Exception) -> str:
    """What to tell of an error; of ours its own words, of the system's what it says and on which file."""
    if isinstance(error, MlxDistillError):
        return str(error)
    if isinstance(error, OSError):
        file = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        return f"{file}{error.strerror or error}."
    if isinstance(error, ImportError):
        return f"{error}.\n  What is missing, and how to get it:  mlx-distill doctor"
    if isinstance(error, RecursionError):
        return "a file is nested too deeply to be read."
    return "There is not enough memory.\n  Take a smaller model, or fewer rows at once."


def _parameter(name: str, field: FieldInfo) -> click.Parameter:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    if extra.get("argument"):
        needed = field.is_required()
        return click.Argument([name], required=needed, metavar=name.upper() if needed else f"[{name.upper()}]")
    flag = "--" + name.replace("_", "-")
    if field.annotation is bool:
        switch = f"{flag}/--no-{flag[2:]}" if field.default is True else flag
        return click.Option([switch, name], is_flag=True, default=None, help=_help(field))
    return click.Option(
        [flag, name], required=field.is_required(), default=None, metavar=_metavar(field.annotation), help=_help(field)
    )


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    # A default that is made, such as a path that follows from another flag, is told by the description; so is none.
    if field.is_required() or field.default_factory or field.default in (None, "") or field.annotation is bool:
        return text
    return f"{text}  [default: {field.default}]"


def _metavar(annotation: Any) -> str:
    words: list[str] = []
    for kind in kinds_of(annotation):
        if get_origin(kind) is Literal:
            words += map(str, get_args(kind))
        elif kind is not NoneType:
            words.append({int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT"))
    return "|".join(words)


def _as_flags(message: str, settings: type[Settings]) -> str:
    for name, field in settings.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if not extra.get("argument"):
            for ending in (" = ", " is required"):
                # A whole word, as one key may end with another: batch_size, micro_batch_size.
                message = re.sub(rf"(?<!\w){name}{ending}", f"--{name.replace('_', '-')}{ending}", message)
    return message
