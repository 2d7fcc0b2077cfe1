"""README.md against the tree: its command lines can be typed, its links lead somewhere, its lists are whole."""

from __future__ import annotations

import re
import shlex

import click
import pytest

from mlx_distill.cli.main import COMMANDS, main
from mlx_distill.settings import parse_settings
from tests.children import ROOT
from tests.test_config import commands_with_settings

PAGES = ("README.md", "MEASUREMENTS.md", "CONTRIBUTING.md")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def typed() -> list[str]:
    """The command lines in the README's blocks, each whole and without its comment."""
    blocks = re.findall(r"^```\n(.*?)^```$", text_of("README.md"), flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [re.split(r"\s+#", line.strip(), maxsplit=1)[0] for line in lines if line.strip().startswith("mlx-distill ")]


@pytest.mark.parametrize("line", typed())
def test_what_is_to_be_copied_is_a_command_with_settings_that_can_be(line: str) -> None:
    _, name, *words = shlex.split(line)
    command = main.get_command(click.Context(main), name)
    assert command is not None
    given = {key: value for key, value in command.make_context(name, words).params.items() if value is not None}
    given.pop("as_json")
    parse_settings(commands_with_settings()[name], given, where=line)


def test_the_table_has_every_command_in_the_order_of_the_help() -> None:
    table = text_of("README.md").partition("## The flow")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `mlx-distill ([a-z-]+)", table, flags=re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", text_of(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        # Pictures and collections are no part of every distribution.
        assert (ROOT / path).exists() or path.startswith("visuals/"), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", text_of(path or page), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}, target


def test_every_module_is_named() -> None:
    named = set(re.findall(r"[\w*]+", text_of("README.md").partition("## The package")[2]))
    package = ROOT / "mlx_distill"
    found = {path.stem for path in package.glob("[!_]*.py")} | {
        path.parent.name for path in package.glob("*/__init__.py")
    }
    scripts = {path.name for path in (ROOT / "scripts").iterdir() if path.is_file() and not path.suffix}
    assert found | {name for name in scripts if not name.startswith("bench_")} <= named
