"""`mlx-distill report`."""

from __future__ import annotations

from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import ReportConfig
from mlx_distill.progress import Progress


@make_command(
    ReportConfig,
    examples="""
    mlx-distill report visuals/demo
    mlx-distill report visuals/demo --against visuals/rank-16,visuals/dora
    mlx-distill report visuals/demo --only png --theme dark
    """,
    keeps="Files already written are whole; the same command writes them all again.",
)
def command(config: ReportConfig, progress: Progress) -> Summary:
    """Draw the charts and write the report of a comparison."""
    from mlx_distill.report.run import report

    files = report(config, progress)
    lines = [files.headline, *(f"Missing: {text}" for text in files.missing), ""]
    texts = {"report": files.page, "tables": files.results, "flow chart": files.pipeline}
    written = [(name, path) for name, path in texts.items() if path is not None]
    written += [(name.replace("_", " "), path) for name, path in files.charts.items()]
    lines += [f"{what:<18} {path}" for what, path in written]
    named = {"report": files.page, "results": files.results, "pipeline": files.pipeline}
    return Summary(
        data={
            **{name: None if path is None else str(path) for name, path in named.items()},
            "charts": {name: str(path) for name, path in files.charts.items()},
            "headline": files.headline,
            "prompts": files.prompts,
            "scores": files.scores,
            "pass_at_1": files.passes,
            "unfinished": files.unfinished,
            "missing": list(files.missing),
        },
        lines=lines,
    )
