"""`mlx-distill pull`."""

from __future__ import annotations

from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import PullConfig
from mlx_distill.progress import Progress


@make_command(
    PullConfig,
    examples="""
    mlx-distill pull me/mine
    mlx-distill pull me/mine@v1 --run adapters/theirs
    """,
    keeps="No folder was made; what was downloaded is kept in the Hub's cache.",
)
def command(config: PullConfig, progress: Progress) -> Summary:
    """Take a shared adapter from the Hugging Face Hub, ready for fuse and compare.

    Safetensors and text alone are taken, whole or not at all. An adapter in PEFT's layout is left in a folder beside,
    for import-adapter.
    """
    from mlx_distill.share.pull import pull

    pulled = pull(config, progress)
    data = {
        "folder": str(pulled.folder),
        "repo": pulled.repo,
        "commit": pulled.commit,
        "layout": pulled.kind,
        "base": pulled.base,
        "fresh": pulled.fresh,
    }
    did = "Pulled" if pulled.fresh else "Nothing to do: this is"
    lines = [f"{did} {pulled.repo} at {pulled.commit[:12]}.", f"  folder   {pulled.folder}"]
    if pulled.kind == "peft":
        lines.append(f"  next:    mlx-distill import-adapter {pulled.folder} --run {pulled.run}")
    else:
        lines += [f"  base     {pulled.base}", f"  next:    mlx-distill fuse {pulled.run}"]
    return Summary(data, lines)
