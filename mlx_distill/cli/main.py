"""The group `mlx-distill`. Commands are imported only when they are called, so that `--help` is quick."""

from __future__ import annotations

import importlib

import click

from mlx_distill import __version__
from mlx_distill.cli import exits

#: Commands in the order of the work, with their line in the group's help. Each lives in `cli/NAME.py` as `command`.
COMMANDS: dict[str, str] = {
    "demo": "The whole loop on a small real model, offline, in minutes.",
    "run": "Walk a recipe from prompts to report; unchanged steps are skipped.",
    "prompts": "Expand a prompt file into the prompts to ask.",
    "collect": "Ask a teacher every prompt and make a data set of its answers.",
    "cost": "What a collection of any size would cost, with any teacher.",
    "prune": "Make a smaller student by taking layers out of a model.",
    "logits": "Write a local teacher's distribution over a data set.",
    "train": "Train a LoRA adapter on a data set.",
    "runs": "List training runs side by side, with what differs between them.",
    "fuse": "Merge an adapter into its base model.",
    "export": "Write an adapter or a fused model in another tool's format.",
    "import-adapter": "Make a run of an adapter that PEFT wrote.",
    "chat": "Talk with the base model and the distilled student side by side.",
    "compare": "Let teacher, base and distilled student answer held-out prompts.",
    "judge": "Score the answers of a comparison.",
    "report": "Draw the charts and write the report of a comparison.",
    "share": "Publish a run on the Hugging Face Hub, with a model card.",
    "pull": "Take a shared adapter from the Hugging Face Hub.",
    "bench": "Time MLX against PyTorch on the same batches.",
    "doctor": "Show what this machine has, and how to get what it lacks.",
}


class LazyGroup(click.Group):
    """A group that knows its commands by name and imports one when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"mlx_distill.cli.{cmd_name.replace('-', '_')}")
        found = module.command
        assert isinstance(found, click.Command)
        return found

    def invoke(self, ctx: click.Context) -> object:
        """Run a command; an interruption before it has begun, as while it is imported, ends like any other."""
        try:
            with exits.terminable():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nInterrupted. Nothing had begun.", err=True)
            ctx.exit(exits.INTERRUPTED)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        import difflib

        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else ""
            raise click.UsageError(f"No such command '{args[0]}'.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    epilog="\b\nStart with:         mlx-distill demo\nHelp on a command:  mlx-distill COMMAND --help",
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="mlx-distill")
def main() -> None:
    """Distil a large teacher into a small student, on one Mac.

    prompts → collect → train → fuse → compare → judge → report
    """
