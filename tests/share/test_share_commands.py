"""`share` and `pull` as commands: one JSON object, words for a person, and errors without a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_distill.cli.main import main
from tests.servers.hub_api import Fault, HubApi
from tests.share.conftest import BASE, REPO


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_share_and_pull(hub: HubApi, run: Path) -> None:
    done = call("share", str(run), "--repo", REPO)
    assert done.exit_code == 0, done.output
    assert f"in {REPO}, which is private" in done.stdout
    assert f"mlx-distill pull {REPO}" in done.stdout
    taken = call("pull", REPO, "--run", "adapters/theirs")
    assert taken.exit_code == 0, taken.output
    assert "mlx-distill fuse adapters/theirs" in taken.stdout
    assert BASE in taken.stdout
    again = call("pull", REPO, "--run", "adapters/theirs")
    assert again.stdout.startswith("Nothing to do")
    assert "nothing was changed" in call("share", str(run), "--repo", REPO).stdout


def test_as_json(hub: HubApi, run: Path) -> None:
    shown = json.loads(call("share", str(run), "--repo", REPO, "--dry-run", "--json").stdout)
    assert hub.requests == []
    assert shown["dry_run"]
    assert shown["card"].startswith("---\n")
    sent = json.loads(call("share", str(run), "--repo", REPO, "--json").stdout)
    assert sent["files"] == shown["files"]
    assert sent["commit"] == hub.repos[REPO].commits[-1][0]
    assert (sent["private"], sent["created"], sent["changed"]) == (True, True, True)
    taken = json.loads(call("pull", REPO, "--run", "adapters/theirs", "--json").stdout)
    assert taken["commit"] == sent["commit"]
    assert (taken["layout"], taken["fresh"]) == ("mlx", True)


def test_a_dry_run_shows_every_file_and_the_card(hub: HubApi, run: Path) -> None:
    shown = call("share", str(run), "--repo", REPO, "--what", "both", "--dry-run").stdout
    call("share", str(run), "--repo", REPO, "--what", "both")
    files = hub.repos[REPO].files
    for name, data in files.items():
        if name != ".gitattributes":
            assert any(line.split()[:2] == [name, f"{len(data):,}"] for line in shown.splitlines() if line.strip())
    assert files["README.md"].decode().strip() in shown
    assert "Nothing was sent" in shown


def test_an_error_is_a_message(hub: HubApi, run: Path) -> None:
    hub.faults.append(Fault("POST", "/commit/", 403, times=9))
    failed = call("share", str(run), "--repo", REPO)
    assert failed.exit_code == 1
    assert "\nError: Making the commit: your token may not write" in failed.stderr
    assert "Traceback" not in failed.output
    assert failed.stdout == ""


@pytest.mark.parametrize("arguments", [("share", "adapters/none", "--repo", REPO), ("pull", "someone/none")])
def test_what_is_not_there(hub: HubApi, arguments: tuple[str, ...]) -> None:
    failed = call(*arguments)
    assert failed.exit_code == 1
    assert "Error: " in failed.stderr
    assert failed.stdout == ""
    assert "Traceback" not in failed.output
