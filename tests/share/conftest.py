"""A trained run, its base and a comparison of it, and the Hub on loopback that they go to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from mlx_distill import layout
from mlx_distill.config import FuseConfig, ShareConfig
from mlx_distill.fuse import fuse
from mlx_distill.manifest import Manifest, TeacherTerms
from mlx_distill.records import ComparisonRecord, DimensionScore, Generation, ModelRecord, Prompt, Verdict
from mlx_distill.run_records import RunRecord
from mlx_distill.share.run import Shared, share
from mlx_distill.training.run import train
from tests.servers.hub_api import TOKEN, HubApi, hub_api
from tests.tiny import make_tiny_model
from tests.training.runs import make_data, settings

BASE = "labs/tiny-base"
REPO = "someone/mine"


@dataclass(frozen=True)
class Trained:
    """A finished run on the base as the Hub has it, with its fused model; do not write into it."""

    run: Path
    data: Path
    base: dict[str, bytes]


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("share")
    model = make_tiny_model(root / "model", layers=2, hidden=32)
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n", encoding="utf-8")
    data = make_data(root / "rows" / "mine")
    run = root / "adapters" / "mine"
    train(settings(data, model, run, epochs=1, learning_rate=0.02))
    fuse(FuseConfig(run=run))
    return Trained(run, data, {path.name: path.read_bytes() for path in model.iterdir()})


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: Trained) -> Iterator[HubApi]:
    """A Hub that has the base, and an empty cache of this machine."""
    monkeypatch.chdir(tmp_path)
    with hub_api() as running:
        running.put(BASE, trained.base)
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("MLX_DISTILL_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_HUB_OFFLINE")
        monkeypatch.delenv("MLX_DISTILL_OFFLINE")
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield running


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited, none of them really."""
    waited: list[float] = []
    monkeypatch.setattr("mlx_distill.share.session.time.sleep", waited.append)
    return waited


@pytest.fixture
def run(tmp_path: Path, hub: HubApi, trained: Trained) -> Path:
    """A copy of the run, trained on the base by its Hub id."""
    folder = tmp_path / "adapters" / "mine"
    shutil.copytree(trained.run, folder)
    rewrite(folder, model=hub_model(hub))
    return folder


def publish(run: Path, **changes: Any) -> Shared:
    return share(ShareConfig.model_validate({"run": run, "repo": REPO, **changes}))


def hub_model(hub: HubApi) -> ModelRecord:
    commit = hub.repos[BASE].commits[-1][0]
    return ModelRecord(
        spec=BASE, source="hub", path="/Users/somebody/hub", name="tiny-base", revision=commit, licence="apache-2.0"
    )


def rewrite(folder: Path, **changes: Any) -> RunRecord:
    """Change the record of a run; a change of its configuration changes single keys."""
    path = layout.RunFolder(folder).record
    record = layout.read_record(path, RunRecord)
    if "config" in changes:
        changes["config"] = {**record.config, **changes["config"]}
    record = record.model_copy(update=changes)
    path.write_text(record.model_dump_json(), encoding="utf-8")
    return record


def manifest(teacher: str = "recorded:data/starter", *, forbids: bool = False) -> Manifest:
    return Manifest(
        name="mine",
        created="2026-11-24T10:00:00+00:00",
        teacher=teacher,
        terms=TeacherTerms(
            teacher=teacher,
            licence="Usage policy" if forbids else "MIT",
            summary="No training on answers." if forbids else "Answers of our own.",
            requires_acceptance=forbids,
            accepted=forbids,
        ),
        prompts=12,
        answered=10,
        rows={"train": 10},
        families={"train": 5},
        sha256={"train": "a" * 64},
        cost_usd=1.25,
        prices_dated="2026-11-01",
        collection_seconds=75,
    )


def make_comparison(
    folder: Path, run: Path | None = None, *, families: int = 4, judge: str = "rubric", gain: float = 2.0
) -> Path:
    """Of a run's adapter. A family has two prompts; base scores 2 to 5, the student `gain` and `gain` + 0.1 more."""
    adapter = layout.file_sha256(run / "adapters.safetensors") if run else "0" * 64
    folder.mkdir(parents=True)
    files = layout.ComparisonFolder(folder)
    for number in range(2 * families):
        prompt = Prompt(id=f"p{number}", family=f"f{number // 2}", text="Sort it.")
        for contender in ("base", "distilled"):
            score = 2 + number % 4 + (gain + (number % 2) / 10 if contender == "distilled" else 0)
            answer = Generation(
                prompt=prompt,
                contender=contender,  # type: ignore[arg-type]
                model=f"mine@{adapter[:12]}" if contender == "distilled" else "m",
                text=f"{contender} {number}",
                stop="length" if number == 0 else "end",
                output_tokens=3,
                seconds=0.1,
                max_tokens=10,
            )
            verdict = Verdict(
                prompt_id=prompt.id,
                contender=answer.contender,
                judge=judge,
                answer_sha256=answer.answer_sha256,
                scores={"correctness": DimensionScore(score=score, rationale="so")},
            )
            layout.append_row(files.generations, answer)
            layout.append_row(files.verdicts, verdict)
    record = ComparisonRecord(
        name="mine",
        run="adapters/mine",
        created="2026-11-24T10:00:00+00:00",
        models={"base": "b", "distilled": "d"},
        prompts="/home/somebody/prompts/heldout.toml",
        prompts_sha256="c" * 64,
        max_tokens=10,
        device="CPU",
    )
    files.record.write_text(json.dumps(record.model_dump()), encoding="utf-8")
    files.results.write_text(f"# Results\n\n`mlx-distill report {folder.absolute()}`\n", encoding="utf-8")
    files.chart("model_scorecard").write_bytes(b"\x89PNG\r\n\x1a\n")
    return folder
