"""`mlx-distill demo`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from mlx_distill import layout
from mlx_distill.cli.command import example_block, json_option
from mlx_distill.cli.run import force_option, set_option, walk_recipe
from mlx_distill.errors import InputError

_RECIPE = "recipes/demo.toml"


def _demo(overrides: Sequence[str], force: Sequence[str], show_recipe: bool, as_json: bool) -> None:
    recipe = layout.bundled(_RECIPE)
    if recipe is None:
        raise click.ClickException(str(InputError("this installation lacks data/recipes/demo.toml; install it again.")))
    if show_recipe:
        click.echo(recipe.read_text(encoding="utf-8"), nl=False)
        return
    walk_recipe(recipe, overrides, force, as_json=as_json)


command = click.Command(
    "demo",
    callback=_demo,
    params=[
        set_option(),
        force_option(),
        click.Option(["--show-recipe"], is_flag=True, help="Print the demo's recipe, as a start for your own."),
        json_option(),
    ],
    help="""The whole loop on a small real model, in minutes.

    SmolLM2-135M learns from answers written for this project; no key and, once the model is there, no network.
    Writes data/demo, adapters/demo and visuals/demo in the current folder. A second call skips what is done.""",
    epilog=example_block(
        """
        mlx-distill demo
        mlx-distill demo --set train.epochs=3 --set name=demo3
        mlx-distill demo --show-recipe > recipe.toml
        """
    ),
)
