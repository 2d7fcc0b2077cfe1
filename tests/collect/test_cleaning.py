"""What is left out of training beside unfinished answers, by reason, and what the manifest says of it."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_distill.cli.main import main
from mlx_distill.collect.cleaning import in_thread
from mlx_distill.collect.run import collect_from_spec
from mlx_distill.config import CollectConfig
from mlx_distill.errors import InputError
from mlx_distill.layout import DataFolder, read_rows
from mlx_distill.ledger import Ledger
from mlx_distill.manifest import Manifest
from mlx_distill.progress import Progress
from mlx_distill.prompts import load_prompts
from mlx_distill.records import ChatRow

GOOD = "```python\ndef double(n):\n    return 2 * n\n\nassert double(2) == 4\n```"
BAD = "```python\nassert 2 * 2 == 5\n```"
SECRET = "Use `AKIAQ3EGRZTX7WNB5KLM` as the key id."
LONG = "Write a function that merges two sorted lists of integers into one sorted list, in linear time, and test it."
WALK = (
    "Keep one index a list and compare the two numbers that they point at. Append the smaller one to the result and "
    "move its index on. When either list is used up, append what is left of the other as it stands. Every number is "
    "looked at once, so the time grows with the sum of both lengths, and equal numbers keep their order."
)


@pytest.fixture
def held_out() -> str:
    return load_prompts(Path("data/prompts/heldout.toml"))[0].text


@pytest.fixture
def config(tmp_path: Path, held_out: str) -> CollectConfig:
    rows = {
        "fine": ("Double a number.", GOOD),
        "wrong": ("Prove that two times two is five.", BAD),
        "secret": ("Show me how to set up a cloud account.", SECRET),
        "first": (LONG, WALK),
        "second": (LONG.replace("and test it", "and test them"), WALK + " Done."),
        "leaked": (held_out, "An answer to a held-out prompt."),
        "prose": ("Why is the sky blue?", "Short waves are scattered more."),
    }
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"id": name, "family": name, "text": prompt}) + "\n" for name, (prompt, _) in rows.items()),
        encoding="utf-8",
    )
    (tmp_path / "record.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in rows.values()),
        encoding="utf-8",
    )
    return CollectConfig(
        prompts=tmp_path / "prompts.jsonl",
        teacher=f"recorded:{tmp_path / 'record.jsonl'}",
        out=tmp_path / "out",
        valid_fraction=0,
        test_fraction=0,
    )


def dropped(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    return {drop.reason: drop.prompt_ids for drop in manifest.dropped}


def test_each_is_left_out_for_its_reason_and_kept_in_the_ledger(config: CollectConfig) -> None:
    manifest = collect_from_spec(config)
    assert dropped(manifest) == {"contaminated": ("leaked",), "credentials": ("secret",), "duplicate": ("second",)}
    assert (manifest.answered, manifest.rows["train"]) == (7, 4)
    heldout_id = load_prompts(Path("data/prompts/heldout.toml"))[0].id
    assert manifest.contaminated == {"leaked": heldout_id}
    assert manifest.held_out == ("data/prompts/heldout.toml",)
    assert sum(manifest.credentials.values()) == 1
    assert manifest.verification is None
    assert "AKIA" not in (config.out / "train.jsonl").read_text(encoding="utf-8")
    assert "AKIA" not in (config.out / "manifest.json").read_text(encoding="utf-8")
    with Ledger(DataFolder(config.out).ledger) as ledger:
        assert ledger.counts()["answered"] == 7
    assert collect_from_spec(config) == manifest


def test_what_is_switched_off_keeps_its_rows(config: CollectConfig) -> None:
    off = config.model_copy(update={"eval_prompts": "", "duplicate_threshold": 0.0})
    assert dropped(collect_from_spec(off)) == {"credentials": ("secret",)}


def test_other_files_can_be_held_against(config: CollectConfig, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Why is the sky blue?\n", encoding="utf-8")
    both = config.model_copy(update={"eval_prompts": f"data/prompts/heldout.toml, {other}"})
    assert dropped(collect_from_spec(both))["contaminated"] == ("leaked", "prose")
    with pytest.raises(InputError):
        collect_from_spec(config.model_copy(update={"eval_prompts": str(tmp_path / "missing.txt")}))


def test_code_runs_only_when_asked_for_and_failing_answers_are_left_out(config: CollectConfig) -> None:
    verified = collect_from_spec(config.model_copy(update={"verify": True}))
    assert dropped(verified)["failing code"] == ("wrong",)
    found = verified.verification
    assert found is not None
    assert (found.passed, found.failed, found.without_code, found.failing) == (1, 1, 3, ("wrong",))
    assert found.isolation
    kept = collect_from_spec(config.model_copy(update={"verify": True, "keep_failing": True}))
    assert "failing code" not in dropped(kept)
    assert kept.verification == found
    assert len(read_rows(config.out / "train.jsonl", ChatRow)) == 4


def test_the_summary_says_it_all(config: CollectConfig) -> None:
    arguments = ["collect", "--prompts", config.prompts, "--teacher", config.teacher, "--out", config.out, "--verify"]
    told = CliRunner().invoke(main, [*map(str, arguments), "--valid-fraction", "0", "--test-fraction", "0"])
    assert told.exit_code == 0, told.output
    assert "Left out, duplicate: 1 (second)." in told.stdout
    assert "Too close to the held-out prompt" in told.stdout
    assert "Verified: 1 answers pass, 1 fail, 3 hold no Python" in told.stdout
    assert "Failing: wrong." in told.stdout


async def test_work_in_a_thread_stops_where_it_reports() -> None:
    going, steps = threading.Event(), []

    def work(progress: Progress) -> None:
        with progress.task("x") as bar:
            for n in range(10_000):
                steps.append(n)
                going.set()
                bar.advance()
                threading.Event().wait(0.001)

    task = asyncio.create_task(in_thread(work, Progress()))
    await asyncio.to_thread(going.wait)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    count = len(steps)
    await asyncio.sleep(0.05)
    assert len(steps) == count < 10_000
