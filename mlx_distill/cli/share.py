"""`mlx-distill share`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import ShareConfig
from mlx_distill.progress import Progress

if TYPE_CHECKING:
    from mlx_distill.share.run import Shared


@make_command(
    ShareConfig,
    examples="""
    mlx-distill share adapters/mine --repo me/mine --dry-run
    mlx-distill share adapters/mine --repo me/mine
    mlx-distill share adapters/mine --repo me/mine --what both --public
    """,
    keeps="Nothing was committed; files that were sent are not sent again by the same command.",
)
def command(config: ShareConfig, progress: Progress) -> Summary:
    """Publish a run on the Hugging Face Hub, with a model card made from what is on the disk.

    A new repository is private unless --public says otherwise; an earlier publication is updated in one commit.
    Secrets, rows whose teacher's terms forbid it, and an adapter whose base has no name on the Hub are not published.
    """
    from mlx_distill.share.run import share

    shared = share(config, progress)
    files = [{"name": file.name, "bytes": file.size, "sha256": file.sha256} for file in shared.files]
    data = {"repo": shared.repo, "dry_run": config.dry_run, "files": files, "bytes": shared.bytes}
    if shared.upload is None:
        return Summary({**data, "card": shared.card}, _dry_lines(config, shared))
    sent = shared.upload
    data |= {"url": sent.url, "commit": sent.commit, "private": sent.private, "created": sent.created}
    data |= {"changed": sent.changed, "removed": list(sent.removed)}
    who = "private" if sent.private else "public"
    if sent.changed:
        first = f"Published {len(files)} files ({_size(shared.bytes)}) in {shared.repo}, which is {who}."
    else:
        first = f"{shared.repo}, which is {who}, holds these {len(files)} files already; nothing was changed."
    lines = [first]
    if sent.removed:
        lines.append(f"  removed  {', '.join(sent.removed)} (of an earlier publication)")
    lines += [f"  page     {sent.url}", f"  commit   {sent.commit}"]
    if config.what != "fused":
        lines.append(f"  use it:  mlx-distill pull {shared.repo}")
    return Summary(data, lines)


def _dry_lines(config: ShareConfig, shared: Shared) -> list[str]:
    who = "public" if config.public else "private"
    width = max(len(file.name) for file in shared.files)
    return [
        f"Would publish {len(shared.files)} files ({_size(shared.bytes)}) in {shared.repo}, {who} if it is new:",
        *(f"  {file.name:<{width}}  {file.size:>13,} bytes  {file.sha256[:12]}" for file in shared.files),
        "",
        *shared.card.splitlines(),
        "",
        "Nothing was sent. Without --dry-run the same command publishes it.",
    ]


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
