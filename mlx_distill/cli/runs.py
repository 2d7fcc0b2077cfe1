"""`mlx-distill runs`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from mlx_distill.cli.columns import Column, Style, table
from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import RunsConfig
from mlx_distill.progress import Progress

if TYPE_CHECKING:
    from mlx_distill.run_list import RunEntry

_UNKNOWN = "–"


@make_command(
    RunsConfig,
    examples="""
    mlx-distill runs
    mlx-distill runs adapters --sort loss
    mlx-distill runs adapters --sort divergence
    mlx-distill runs adapters/mine --json
    """,
    keeps="Nothing was changed.",
)
def command(config: RunsConfig, progress: Progress) -> Summary:
    """List training runs side by side, with what differs between them.

    All runs in FOLDER and in the folders right below it, finished or not. FOLDER is adapters unless given, and may
    itself be a run.
    """
    from mlx_distill.run_list import list_runs, settings_that_differ

    # Before the first training its folder is not there; any other name that is not there is a mistake.
    known = config.folder.exists() or config.folder != RunsConfig().folder
    entries = list_runs(config.folder, order=config.sort) if known else []
    differing = settings_that_differ(entries)
    data = {
        "folder": str(config.folder),
        "runs": [entry.model_dump() for entry in entries],
        "settings_that_differ": differing,
    }
    if not entries:
        return Summary(data, [f"No runs in {config.folder}.", f"The first:  {_first_command(config)}"])
    return Summary(data, lambda width: _lines(entries, differing, width))


def _first_command(config: RunsConfig) -> str:
    return f"mlx-distill train --data data/NAME --run {config.folder}/NAME     or all steps at once:  mlx-distill demo"


def _lines(entries: Sequence[RunEntry], differing: dict[str, dict[str, Any]], width: int | None) -> list[str]:
    from mlx_distill.run_list import comparable

    whole = [entry for entry in entries if entry.status != "damaged"]
    lines = table(_results(entries), width, head=_bold)
    if differing:
        shown = [entry for entry in whole if any(entry.name in values for values in differing.values())]
        lines += ["", _bold("Settings that differ"), *table(_settings(shown, differing), width, head=_bold)]
    if whole:
        lines += ["", f"{'The same in all' if len(whole) > 1 else 'Settings'}: {_alike(whole, differing)}."]
    if not comparable(entries):
        lines += ["", "Not all were validated on the same rows with the same model: do not compare their losses."]
    if not _alike_divergences(entries):
        lines += [
            "",
            "Not all learned by the same divergence: do not compare theirs. What  mlx-distill compare  measures is the "
            "same for all.",
        ]
    damaged = [entry for entry in entries if entry.status == "damaged"]
    if damaged:
        lines += ["", *(f"{_seen(entry.name)} is damaged: {_seen(entry.problem or '')}" for entry in damaged)]
    return lines


def _results(entries: Sequence[RunEntry]) -> list[Column]:
    from mlx_distill.report.wording import count, duration, gigabytes, loss, percent

    best_loss = min((e.valid_loss for e in entries if e.valid_loss is not None), default=None)
    best_accuracy = max((e.token_accuracy for e in entries if e.token_accuracy is not None), default=None)
    divergences = [e.divergence for e in entries if e.divergence is not None]
    nearest = min(divergences, default=None) if _alike_divergences(entries) else None
    several = len(entries) > 1

    def column(head: str, cell: Callable[[RunEntry], str], best: Callable[[RunEntry], bool] | None = None) -> Column:
        styles = [_bold if several and best is not None and best(entry) else None for entry in entries]
        return Column(head, [cell(entry) for entry in entries], right=True, styles=styles)

    return [
        Column("run", [_seen(entry.name) for entry in entries]),
        Column("status", [_status(entry) for entry in entries], styles=[_COLOURS[entry.status] for entry in entries]),
        column(
            "validation loss",
            lambda e: _UNKNOWN if e.valid_loss is None else f"{loss(e.first_valid_loss)} → {loss(e.valid_loss)}",
            lambda e: e.valid_loss is not None and e.valid_loss == best_loss,
        ),
        *(
            [
                column(
                    "divergence",
                    lambda e: (
                        _UNKNOWN if e.divergence is None else f"{loss(e.first_divergence)} → {loss(e.divergence)}"
                    ),
                    lambda e: e.divergence is not None and e.divergence == nearest,
                )
            ]
            if divergences
            else []
        ),
        column(
            "accuracy",
            lambda e: percent(e.token_accuracy),
            lambda e: e.token_accuracy is not None and e.token_accuracy == best_accuracy,
        ),
        column("test loss", lambda e: loss(e.test_loss)),
        column("epochs", _epochs),
        column("tokens/s", lambda e: count(e.tokens_per_second)),
        column("memory", lambda e: gigabytes(e.peak_memory_bytes)),
        column("time", lambda e: duration(e.seconds)),
        Column("created", [_moment(entry) for entry in entries]),
    ]


def _alike_divergences(entries: Sequence[RunEntry]) -> bool:
    """Whether the divergences of runs are of one kind, so that they may be held against each other."""
    kinds = set()
    for entry in entries:
        if entry.divergence is not None:
            kind = entry.settings.get("distill")
            beta = entry.settings.get("distill_beta") if kind == "jsd" else None
            kinds.add((str(kind), str(beta), str(entry.settings.get("distill_temperature"))))
    return len(kinds) <= 1


def _settings(entries: Sequence[RunEntry], differing: dict[str, dict[str, Any]]) -> list[Column]:
    def cells(values: dict[str, Any]) -> list[str]:
        return [_value(values[entry.name]) if entry.name in values else _UNKNOWN for entry in entries]

    return [
        Column("run", [_seen(entry.name) for entry in entries]),
        *(Column(_seen(key.replace("_", " ")), cells(values)) for key, values in differing.items()),
    ]


def _alike(entries: Sequence[RunEntry], differing: dict[str, dict[str, Any]]) -> str:
    """What one asks of a training first, as far as all have it alike."""
    texts: dict[str, Callable[[RunEntry], str | None]] = {
        "model": lambda e: e.model,
        "train rows": lambda e: (
            f"{e.rows:,} rows" + (f" of {e.tokens:,} tokens" if e.tokens else "") if e.rows else None
        ),
        "epochs": lambda e: f"{e.planned_epochs} epoch{'s' * (e.planned_epochs != 1)}" if e.planned_epochs else None,
        "rank": lambda e: f"rank {e.rank}" if e.rank else None,
        "layers": lambda e: f"{e.layers} layers" if e.layers else None,
        "learning_rate": lambda e: f"learning rate {e.learning_rate:g}" if e.learning_rate else None,
    }
    found = [{text(entry) for entry in entries} - {None} for key, text in texts.items() if key not in differing]
    return ", ".join(_seen(str(*values)) for values in found if len(values) == 1) or "nothing"


def _status(entry: RunEntry) -> str:
    if entry.step is None or (entry.status == "finished" and not entry.stopped_early):
        return entry.status
    of = f" of {entry.planned_steps:,}" if entry.planned_steps is not None else ""
    return f"{entry.status}{' early,' if entry.stopped_early else ''} at step {entry.step:,}{of}"


def _epochs(entry: RunEntry) -> str:
    if entry.epochs is None:
        return _UNKNOWN
    done = f"{entry.epochs:.1f}".removesuffix(".0")
    return done if entry.planned_epochs in (None, entry.epochs) else f"{done} of {entry.planned_epochs}"


def _moment(entry: RunEntry) -> str:
    return _seen(entry.created or _UNKNOWN) if entry.began is None else f"{entry.began:%Y-%m-%d %H:%M}"


def _value(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return _seen(f"{value:g}" if isinstance(value, float) else str(value))


def _seen(text: str) -> str:
    """Foreign text in one line, in which nothing is hidden."""
    from mlx_distill.report.wording import visible

    return " ".join(visible(text).split())


def _bold(text: str) -> str:
    return click.style(text, bold=True)


def _colour(name: str) -> Style:
    return lambda text: click.style(text, fg=name)


_COLOURS: dict[str, Style | None] = {
    "finished": None,
    "training": _colour("green"),
    "starting": _colour("green"),
    "stopped": _colour("yellow"),
    "damaged": _colour("red"),
}
