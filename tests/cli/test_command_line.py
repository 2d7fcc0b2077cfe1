"""What all commands have in common: help, one JSON object, exit codes, and never a traceback."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import mlx_distill
from mlx_distill.cli.command import run_guarded
from mlx_distill.cli.console import Summary
from mlx_distill.cli.main import COMMANDS, main
from mlx_distill.errors import ConfigError, DependencyError, InputError, MlxDistillError
from mlx_distill.evaluation import tasks
from tests.children import ROOT

HEAVY = {"mlx", "mlx_lm", "torch", "anthropic", "openai", "matplotlib", "transformers", "huggingface_hub", "numpy"}


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def command(name: str) -> click.Command:
    found = main.get_command(click.Context(main), name)
    assert found is not None
    return found


# Help.


def modules_after(*arguments: str) -> set[str]:
    """The packages that a fresh interpreter has imported after a command line."""
    source = (
        "import json, sys\nfrom mlx_distill.cli.main import main\n"
        f"try:\n    main({list(arguments)!r})\nexcept SystemExit:\n    pass\n"
        "there = {name.split('.')[0] for name, module in sys.modules.items() if module is not None}\n"
        "sys.stderr.write(json.dumps(sorted(there)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", source],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stderr.splitlines()[-1]))


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], ["no-such-command"]])
def test_help_imports_nothing_that_takes_time(arguments: list[str]) -> None:
    assert modules_after(*arguments) & {*HEAVY, "pydantic", "rich", "asyncio", "sqlite3"} == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_commands_help_imports_no_engine(name: str) -> None:
    assert modules_after(name, "--help") & HEAVY == set()


def test_help_lists_every_command_in_the_order_of_the_work() -> None:
    out = invoke("--help").stdout
    listed = out.partition("Commands:")[2]
    places = [listed.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)
    assert "\n  Help on a command:  mlx-distill COMMAND --help\n" in out
    assert invoke("-h").stdout == out


def test_every_file_of_the_command_line_is_a_command() -> None:
    folder = Path(mlx_distill.__file__).parent / "cli"
    others = {"__init__", "main", "command", "console", "columns", "exits", "estimate", "chat_loop", "chat_view"}
    others |= {"calibration"}
    assert {path.stem.replace("_", "-") for path in folder.glob("*.py") if path.stem not in others} == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples_and_json(name: str) -> None:
    for flag in ("--help", "-h"):
        result = invoke(name, flag)
        assert result.exit_code == 0
        assert f"Usage: main {name} " in result.stdout
        assert "--json" in result.stdout
        assert "\n  Examples:\n    mlx-distill " in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_no_empty_default(name: str) -> None:
    assert "[default: ]" not in " ".join(invoke(name, "--help").stdout.split())


def example_lines(name: str) -> list[str]:
    epilog = command(name).epilog
    assert epilog is not None
    return epilog.partition("Examples:\n")[2].splitlines()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_example_is_a_command_line_that_parses(name: str) -> None:
    lines = example_lines(name)
    assert lines
    for line in lines:
        words = shlex.split(re.split(r"\s{3,}\(|\s>\s", line.strip())[0])
        assert words[:2] == ["mlx-distill", name]
        context = command(name).make_context(name, words[2:])
        assert not context.args


@pytest.mark.parametrize("name", COMMANDS)
def test_the_line_in_the_group_says_what_the_command_says(name: str) -> None:
    beginning = re.split(r"[.;,]", COMMANDS[name])[0]
    assert " ".join((command(name).help or "").split()).startswith(beginning)


# Usage: exit 2.


def test_an_unknown_command_suggests() -> None:
    result = invoke("tarin")
    assert result.exit_code == 2
    assert "No such command 'tarin'. Did you mean 'train'?" in result.stderr
    assert "Did you mean" not in invoke("xyzzy").stderr


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("bench", "demo", "doctor", "runs")])
def test_what_a_command_needs_is_told(name: str) -> None:
    result = invoke(name)
    assert result.exit_code == 2
    assert "Missing argument" in result.stderr or " is required." in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "d", "--run", "r", "--epochs", "three"], "--epochs = 'three': must be a whole number."),
        (["train", "--data", "d", "--run", "r", "--layers", "0"], "--layers = '0': must be above 0 or 'all'."),
        (["train", "--data", "d", "--run", "r", "--batch-size", "0"], "--batch-size = '0': must be above 0."),
        (
            ["train", "--data", "d", "--run", "r", "--micro-batch-size", "0"],
            "--micro-batch-size = '0': must be above 0.",
        ),
        (["train", "--data", "", "--run", "r"], "--data = '': must be a path."),
        (["train", "--data", "d", "--run", "r", "--backend", "jax"], "--backend = 'jax': must be 'mlx' or 'torch'."),
        (["train", "--data", "d", "--run", "r", "--rnak", "8"], "No such option '--rnak'"),
        (["train", "--data", "d", "--run"], "Option '--run' requires an argument."),
        (["fuse", "a", "b"], "Got unexpected extra argument (b)"),
        (["fuse", ""], "run = '': must be a path."),
        (["run", "x.toml", "--set", "train.epochs"], "--set train.epochs: expected KEY=VALUE."),
        (["run", "x.toml", "--force", "everything"], "'everything' is not one of 'prompts', 'collect'"),
        (["demo", "--force", ""], "'' is not one of"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message(arguments: list[str], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == ""


# Failures: exit 1.


def failing_with(error: BaseException) -> Result:
    """`prompts`, with an error where it reads the file."""

    def fail(*_arguments: Any, **_options: Any) -> Any:
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "read_prompts", fail)
        return invoke("prompts", "p.txt")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConfigError("That cannot be.", hint="Do this."), "That cannot be.\n  Do this."),
        (InputError("is odd.", path="x.txt", line=3), "x.txt:3: is odd."),
        (
            DependencyError("openai", extra="openai"),
            "openai is not installed.\n  Install it:  pip install 'mlx-distill[o",
        ),
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y: Permission denied."),
        (OSError(28, "No space left on device"), "No space left on device."),
        (ImportError("libopenblas.so: no such file"), "libopenblas.so: no such file.\n  What is missing, and how"),
        (
            ModuleNotFoundError("No module named 'mlx'"),
            "No module named 'mlx'.\n  What is missing, and how to get it:  ml",
        ),
        (MemoryError(), "There is not enough memory."),
        (RecursionError(), "a file is nested too deeply to be read."),
    ],
)
def test_an_error_is_one_message_and_exit_1(error: Exception, told: str) -> None:
    result = failing_with(error)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {told}")
    assert result.stdout == ""


def test_a_mistake_of_ours_is_not_hidden() -> None:
    result = failing_with(ZeroDivisionError("ours"))
    assert isinstance(result.exception, ZeroDivisionError)


def test_every_error_of_ours_is_one_of_the_tree() -> None:
    from mlx_distill import errors

    found = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)]
    assert len(found) > 8
    assert all(issubclass(error, MlxDistillError) for error in found)


def test_a_command_that_failed_in_part_exits_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run_guarded(lambda: Summary({"n": 1}, ["one failed"], failed=True), as_json=False, keeps="")
    assert caught.value.code == 1
    assert capsys.readouterr().out == "one failed\n"


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("run", "demo", "train")])
def test_every_command_says_how_to_go_on(name: str) -> None:
    """Its sentence for an interruption stands in its file, and is one."""
    text = (Path(mlx_distill.__file__).parent / "cli" / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8")
    (keeps,) = re.findall(r'^    keeps="(.+)",$', text, flags=re.MULTILINE)
    assert re.fullmatch(r"[A-Z].+\.", keeps)


def test_the_demos_recipe_is_printed_as_it_is() -> None:
    result = invoke("demo", "--show-recipe")
    assert result.exit_code == 0
    assert result.stdout == (ROOT / "data" / "recipes" / "demo.toml").read_text(encoding="utf-8")
