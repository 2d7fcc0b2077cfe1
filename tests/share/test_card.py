"""The card says what is on the disk, and its head is one that the Hub and its library read."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from mlx_distill import layout
from mlx_distill.cli.main import COMMANDS
from mlx_distill.config import ShareConfig
from mlx_distill.errors import InputError
from mlx_distill.records import Verdict
from mlx_distill.share.cleaning import clean_run, short
from mlx_distill.share.run import Shared, share
from mlx_distill.share.scores import read_scores
from tests.servers.hub_api import HubApi
from tests.share.conftest import BASE, REPO, hub_model, make_comparison, manifest, rewrite
from tests.training.runs import Recorder


def shown(run: Path, **changes: Any) -> Shared:
    return share(ShareConfig.model_validate({"run": run, "repo": REPO, "dry_run": True, **changes}))


def head(card: str) -> ModelCardData:
    data = ModelCard(card).data
    assert isinstance(data, ModelCardData)
    return data


def test_the_front_matter(hub: HubApi, run: Path, tmp_path: Path) -> None:
    rewrite(run, manifest=manifest(), valid_loss=1.75, test_loss=1.9, token_accuracy=0.5)
    make_comparison(tmp_path / "visuals" / "mine", run)
    data = head(shown(run).card)
    assert data.base_model == BASE
    assert data.get("base_model_relation") == "adapter"
    assert (data.library_name, data.pipeline_tag, data.license) == ("mlx", "text-generation", "apache-2.0")
    assert data.tags == ["mlx", "mlx-distill", "distillation", "lora"]
    assert data.datasets == ["mine"]
    assert data.model_name == "mine"
    results = [(r.dataset_name, r.dataset_split, r.metric_type, r.metric_value) for r in data.eval_results or []]
    assert results == [
        ("mine", "valid", "loss", 1.75),
        ("mine", "valid", "accuracy", 0.5),
        ("mine", "test", "loss", 1.9),
        ("heldout", "test", "score", 5.55),
        ("heldout", "test", "score", 2.05),
    ]
    assert "95 % interval" in str((data.eval_results or [])[3].metric_name)


@pytest.mark.parametrize(
    ("licence", "found"),
    [
        ("apache-2.0", ("apache-2.0", None, None)),
        ("MIT", ("mit", None, None)),
        ("qwen-research", ("other", "qwen-research", f"https://huggingface.co/{BASE}")),
        (None, (None, None, None)),
    ],
)
def test_the_bases_licence_is_the_models(hub: HubApi, run: Path, licence: str | None, found: tuple[Any, ...]) -> None:
    rewrite(run, model=hub_model(hub).model_copy(update={"licence": licence}))
    card = shown(run).card
    data = head(card)
    assert (data.license, data.license_name, data.license_link) == found
    assert ("state no licence" in card) == (licence is None)


def test_several_answers_to_a_prompt_are_counted_as_such(hub: HubApi, run: Path) -> None:
    rewrite(run, manifest=manifest().model_copy(update={"prompts": 20, "answered": 19}))
    assert "19 of 20 prompts were answered." in shown(run).card
    rewrite(run, manifest=manifest().model_copy(update={"prompts": 20, "samples": 3, "answered": 57}))
    assert "57 of 60 requests were answered; each of 20 prompts was asked 3 times." in shown(run).card


@pytest.mark.parametrize("what", ["fused", "both"])
def test_a_whole_model_is_a_finetune(hub: HubApi, run: Path, what: str) -> None:
    assert head(shown(run, what=what).card).get("base_model_relation") == "finetune"


def test_the_scores_with_who_judged_and_how_sure_it_is(hub: HubApi, run: Path, tmp_path: Path) -> None:
    make_comparison(tmp_path / "visuals" / "mine", run)
    card = shown(run).card
    assert "### Scores by a rubric, which is computed and no model's opinion" in card
    assert re.search(r"\| Base \| 3\.50 \| \d\.\d\d to \d\.\d\d \| 8 \| 1 \|", card)
    # Each family's two differences are 2.0 and 2.1: their mean is the same however families are drawn.
    assert "| This model − base | +2.05 | +2.05 to +2.05 | 8 |  |" in card
    assert "8 prompts (`heldout.toml`) of 4 families" in card
    assert "4 families are few" in card
    assert "not distinguishable" not in card
    assert "![Model scorecard](comparison/model_scorecard.png)" in card


def test_no_difference_is_not_claimed(hub: HubApi, run: Path, tmp_path: Path) -> None:
    folder = make_comparison(tmp_path / "elsewhere", run, gain=0.0)
    verdicts = layout.ComparisonFolder(folder).verdicts
    rows = layout.read_rows(verdicts, Verdict)
    verdicts.unlink()
    for number, row in enumerate(rows):
        shift = (0.5 if number % 8 < 4 else -0.6) if row.contender == "distilled" else 0.0
        scores = {k: s.model_copy(update={"score": s.score + shift}) for k, s in row.scores.items()}
        layout.append_row(verdicts, row.model_copy(update={"scores": scores}))
    assert "**not distinguishable**" in shown(run, comparison=folder).card


def test_a_verdict_on_another_answer_does_not_count(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path / "c")
    verdicts = layout.ComparisonFolder(folder).verdicts
    before = read_scores(folder)
    row = layout.read_rows(verdicts, Verdict)[0]
    layout.append_row(verdicts, row.model_copy(update={"answer_sha256": "0" * 64, "scores": {}}))
    assert read_scores(folder) == before
    layout.append_row(verdicts, row.model_copy(update={"scores": {}, "problem": "no JSON"}))
    after = read_scores(folder)
    assert after is not None
    assert after.cards[0].unread == 1
    assert after.cards[0].scores["base"].n == 7
    gain = after.cards[0].gain
    assert gain is not None
    assert gain.n == 7


def test_a_judge_of_the_teachers_family_is_said_to_be(hub: HubApi, run: Path, tmp_path: Path) -> None:
    rewrite(run, manifest=manifest("anthropic:claude-sonnet-4-6", forbids=True))
    make_comparison(tmp_path / "visuals" / "mine", run, judge="anthropic:claude-opus-4-6")
    card = shown(run).card
    assert "`anthropic:claude-opus-4-6` (a model's opinion, and of the teacher's own family)" in card
    assert "No training on answers." in card
    assert "gave their word" in card


def test_one_family_has_no_interval(hub: HubApi, run: Path, tmp_path: Path) -> None:
    make_comparison(tmp_path / "visuals" / "mine", run, families=1)
    card = shown(run).card
    assert "no claim" in card
    assert "95 % interval" not in card.split("---")[1]


def test_what_is_known_of_data_and_training(hub: HubApi, run: Path) -> None:
    record = rewrite(run, manifest=manifest(), seconds=3725.0, peak_memory_bytes=2 * 10**9)
    card = shown(run).card
    for split, summary in record.splits.items():
        assert f"| {split} | {summary.rows} | {summary.tokens} | {summary.target_tokens} | `{summary.sha256}` |" in card
    assert "Answers of our own." in card
    assert "10 of 12 prompts were answered. They cost $1.25 at the prices of 2026-11-01 and took 1 min 15 s." in card
    assert "in 1 h 2 min with 2.00 GB of memory at most" in card
    assert "| rank | `4` |" in card
    assert f"| `adapters.safetensors` | {(run / 'adapters.safetensors').stat().st_size:,} |" in card


def test_whose_distribution_was_learned(hub: HubApi, run: Path) -> None:
    assert "distribution" not in shown(run).card
    config = {"distill": "jsd", "distill_beta": 0.25, "teacher_online": "mlx:/home/me/models/big"}
    taught = {"first_divergence": 1.5, "divergence": 0.25, "distilled_from": "/home/me/models/big"}
    rewrite(run, config=config, teacher_licence="apache-2.0", **taught)
    found = shown(run)
    assert "The distribution of `big` was learned too; its licence: apache-2.0." in found.card
    assert "| Divergence from the teacher before training | 1.5000 |" in found.card
    assert "| Divergence from the teacher | 0.2500 |" in found.card
    assert "| distill_beta | `0.25` |" in found.card
    assert "/home/me" not in found.card + clean_run(rewrite(run), None).model_dump_json()


def test_names_open_no_markup(hub: HubApi, run: Path) -> None:
    hostile = "m<script>alert(1)</script>|`x`\n# Heading"
    rewrite(run, manifest=manifest(hostile), device=hostile)
    card = shown(run).card
    assert "<script" not in card
    assert "\n# Heading" not in card
    assert head(card).base_model == BASE


def test_yaml_of_hostile_names_is_still_yaml(hub: HubApi, run: Path) -> None:
    rewrite(run, manifest=manifest().model_copy(update={"name": "a: [b\n---\nlicense: mit"}))
    data = head(shown(run).card)
    assert data.license == "apache-2.0"
    assert data.datasets == ["a: [b\n---\nlicense: mit"]


@pytest.mark.parametrize("what", ["adapter", "fused", "both"])
def test_the_commands_of_the_card_exist(hub: HubApi, run: Path, what: str) -> None:
    card = shown(run, what=what).card
    for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        ast.parse(block)
    lines = [line for block in re.findall(r"```sh\n(.*?)```", card, re.DOTALL) for line in block.splitlines()]
    words = [shlex.split(line) for line in lines]
    assert {line[0] for line in words} <= {"mlx-distill", "mlx_lm.generate", "ollama", "hf"}
    assert {line[1] for line in words if line[0] == "mlx-distill"} <= COMMANDS.keys()
    for tool in ("mlx-lm", "transformers", "Ollama"):
        assert f"# {tool}" in card


def test_a_comparison_that_was_named_must_be_there(hub: HubApi, run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no comparison here") as caught:
        shown(run, comparison=tmp_path / "none")
    assert "mlx-distill compare" in str(caught.value)


def test_scores_of_another_adapter_are_not_this_ones(hub: HubApi, run: Path, tmp_path: Path) -> None:
    folder = make_comparison(tmp_path / "visuals" / "mine")
    told = Recorder()
    found = share(ShareConfig(run=run, repo=REPO, dry_run=True), told)
    assert "were not judged" in found.card
    assert not any(file.name.startswith("comparison/") for file in found.files)
    assert any("another adapter" in line for line in told.said)
    with pytest.raises(InputError, match="of another adapter"):
        shown(run, comparison=folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/me/data/mine", "mine"),
        ("~/data/mine/", "mine"),
        ("recorded:/home/me/answers", "recorded:answers"),
        ("mlx:./models/teacher", "mlx:teacher"),
        ("C:\\Users\\me\\rows", "rows"),
        ("anthropic:claude-sonnet-4-6", "anthropic:claude-sonnet-4-6"),
        ("labs/tiny-base", "labs/tiny-base"),
        ("https://example.org/terms", "https://example.org/terms"),
        ("data/mine", "data/mine"),
        ("", ""),
        ("/", "unnamed"),
    ],
)
def test_of_a_path_its_last_name_is_kept(text: str, expected: str) -> None:
    assert short(text) == expected
