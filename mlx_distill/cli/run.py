"""`mlx-distill run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from mlx_distill.cli.command import example_block, json_option, run_guarded
from mlx_distill.cli.console import Summary, TerminalProgress
from mlx_distill.errors import ConfigError
from mlx_distill.models.tokenizer import leave_out_torch
from mlx_distill.pipeline import STEPS
from mlx_distill.recipe import Recipe, load_recipe, split_override

KEEPS = "Every finished step stands, and the step under way keeps what it has; the same command goes on from there."


def force_option() -> click.Option:
    """`--force STEP`."""
    return click.Option(
        ["--force"],
        multiple=True,
        type=click.Choice(STEPS),
        metavar="STEP",
        help=f"Run this step again although nothing changed: {', '.join(STEPS)}. Repeatable.",
    )


def set_option() -> click.Option:
    """`--set KEY=VALUE`."""
    return click.Option(
        ["--set", "overrides"],
        multiple=True,
        metavar="KEY=VALUE",
        callback=_check_overrides,
        help="Override a key of the recipe, such as train.epochs=3. Repeatable.",
    )


def _check_overrides(_context: click.Context, _parameter: click.Parameter, values: Sequence[str]) -> Sequence[str]:
    try:
        for value in values:
            split_override(value)
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    return values


def walk_recipe(path: Path, overrides: Sequence[str], force: Sequence[str], *, as_json: bool) -> None:
    """Load a recipe, walk it, and print how it went."""

    def body() -> Summary:
        from mlx_distill.pipeline import walk

        recipe = load_recipe(path, overrides)
        if recipe.train.backend != "torch":
            leave_out_torch()
        outcomes = walk(recipe, force=force, progress=TerminalProgress())
        lines = [f"{o.step:<8} {o.status:<10} {o.seconds:>7.1f} s" for o in outcomes]
        data = {
            "recipe": recipe.name,
            "steps": [{"step": o.step, "status": o.status, "seconds": round(o.seconds, 3)} for o in outcomes],
            **result(recipe),
        }
        return Summary(data, [*lines, "", *_result_lines(data)])

    run_guarded(body, as_json=as_json, keeps=KEEPS)


def result(recipe: Recipe) -> dict[str, object]:
    """The key figures of a walked recipe, read from what it wrote."""
    from mlx_distill import layout
    from mlx_distill.records import Contender, Verdict
    from mlx_distill.run_records import RunRecord

    folder = layout.ComparisonFolder(recipe.report.comparison)
    run = layout.read_record(layout.RunFolder(recipe.train.run).record, RunRecord)
    # Of a jury, the first that is named.
    judge = recipe.judge.judges[0]
    scores: dict[Contender, list[float]] = {}
    for verdict in layout.read_rows(folder.verdicts, Verdict):
        if verdict.judge == judge and verdict.overall is not None:
            scores.setdefault(verdict.contender, []).append(verdict.overall)
    return {
        "adapter": str(layout.RunFolder(recipe.train.run).adapter),
        "first_valid_loss": run.first_valid_loss,
        "valid_loss": run.valid_loss,
        "judge": judge,
        "scores": {contender: round(sum(own) / len(own), 2) for contender, own in scores.items()},
        "report": str(folder.report),
    }


def _result_lines(data: dict[str, object]) -> list[str]:
    lines = []
    if data["valid_loss"] is not None:
        lines.append(f"validation loss  {data['first_valid_loss']:.4f} → {data['valid_loss']:.4f}")
    scores = data["scores"]
    assert isinstance(scores, dict)
    if scores:
        label = "rubric, 0 to 10" if data["judge"] == "rubric" else f"judged by {data['judge']}, 0 to 10"
        lines.append(f"scores           {', '.join(f'{who} {value}' for who, value in scores.items())}  ({label})")
    return [*lines, f"report           {data['report']}"]


command = click.Command(
    "run",
    callback=lambda recipe, overrides, force, as_json: walk_recipe(Path(recipe), overrides, force, as_json=as_json),
    params=[click.Argument(["recipe"], metavar="RECIPE"), set_option(), force_option(), json_option()],
    help="""Walk a recipe from prompts to report.

    A recipe is a TOML file with a name and a section for each step; its keys are the flags of the steps' own commands.
    A step whose inputs have not changed is skipped.""",
    epilog=example_block(
        """
        mlx-distill run recipe.toml
        mlx-distill run recipe.toml --set train.epochs=5 --set name=longer
        mlx-distill run recipe.toml --force report
        """
    ),
)
