"""What is not published, and that the Hub hears nothing of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from mlx_distill import layout
from mlx_distill.config import ShareConfig
from mlx_distill.errors import InputError, MlxDistillError, ModelError
from mlx_distill.layout import file_sha256
from mlx_distill.records import ModelRecord
from mlx_distill.share.base import name_base
from mlx_distill.share.refusals import require_no_credentials
from mlx_distill.share.run import share
from tests.servers.hub_api import HubApi
from tests.share.conftest import REPO, Trained, make_comparison, manifest, rewrite

KEY = "sk-ant-api03-" + "Zq8vN2xLw7Rt4Kd9Hs3Fb6Jm1Pc5Gy0Te8Vu2Xa7Wo4Bn9Dk3Mz6Sq1Ri5Yl0Ef" + "AA"


def refused(hub: HubApi, run: Path, kind: type[MlxDistillError], match: str, **changes: Any) -> str:
    with pytest.raises(kind, match=match) as caught:
        share(ShareConfig.model_validate({"run": run, "repo": REPO, **changes}))
    assert hub.requests == []
    with pytest.raises(kind, match=match):
        share(ShareConfig.model_validate({"run": run, "repo": REPO, "dry_run": True, **changes}))
    return str(caught.value)


@pytest.mark.parametrize("place", ["tokenizer_config.json", "chat_template.jinja", "config.json"])
def test_a_secret_in_the_fused_model(hub: HubApi, run: Path, place: str) -> None:
    path = run / "fused" / place
    if place.endswith(".json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "note": f"use {KEY}"}))
    else:
        path.write_text(f"{{# {KEY} #}}")
    said = refused(hub, run, InputError, "credential.*Anthropic", what="fused")
    assert KEY not in said
    assert place in said


def test_a_secret_in_a_setting_of_the_run(hub: HubApi, run: Path) -> None:
    rewrite(run, config={"report_to": f"https://me:{KEY}@tracker.example.org"})
    assert KEY not in refused(hub, run, InputError, "run.json: .*credential")


def test_a_secret_in_the_results(hub: HubApi, run: Path, tmp_path: Path) -> None:
    comparison = make_comparison(tmp_path / "visuals" / "mine", run)
    layout.ComparisonFolder(comparison).results.write_text(f"# Results\n\nBearer {KEY[13:60]}\n")
    refused(hub, run, InputError, r"results\.md: .*bearer")


def test_a_secret_in_a_row_is_found_by_its_line(hub: HubApi, run: Path, trained: Trained, tmp_path: Path) -> None:
    """Escaped as JSON has it, which hides quotation marks and line breaks."""
    data = shutil.copytree(trained.data, tmp_path / "data" / "mine")
    secret = 'password = "Zq8vN2xLw7Rt4Kd9"'
    lines = (data / "train.jsonl").read_text().splitlines()
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"x\n{secret}\n"}]}
    lines[6] = json.dumps(row)
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    record = rewrite(run, config={"data": str(data)})
    splits = {**record.splits, "train": record.splits["train"].model_copy(update={"sha256": _hash(data)})}
    rewrite(run, splits=splits)
    said = refused(hub, run, InputError, r"train\.jsonl:7: .*assigned secret", data=True)
    assert "Zq8vN2xLw7Rt4Kd9" not in said
    share(ShareConfig(run=run, repo=REPO, dry_run=True))  # without the rows there is nothing to refuse


def _hash(data: Path) -> str:
    return file_sha256(data / "train.jsonl")


def test_a_secret_deep_in_a_long_file_is_found_by_its_line() -> None:
    rows = [json.dumps({"text": f"row {number} " + "word " * 20}) for number in range(6000)]
    rows[5432] = json.dumps({"text": KEY})
    with pytest.raises(InputError, match="long:5433: "):
        require_no_credentials("long", "\n".join(rows), rows=True)
    del rows[5432]
    require_no_credentials("long", "\n".join(rows), rows=True)


def test_rows_go_out_where_the_terms_let_them(hub: HubApi, run: Path, trained: Trained) -> None:
    rewrite(run, config={"data": str(trained.data)}, manifest=manifest())
    share(ShareConfig(run=run, repo=REPO, data=True))
    for split in ("train", "valid", "test"):
        assert hub.repos[REPO].files[f"data/{split}.jsonl"] == (trained.data / f"{split}.jsonl").read_bytes()
    share(ShareConfig(run=run, repo=REPO))
    assert not any(name.startswith("data/") for name in hub.repos[REPO].files)


@pytest.mark.parametrize("place", ["record", "disk"])
def test_rows_of_a_teacher_whose_terms_forbid_it(
    hub: HubApi, run: Path, trained: Trained, tmp_path: Path, place: str
) -> None:
    """Also where training on them was allowed; the manifest on the disk counts as much as the run's own."""
    data = shutil.copytree(trained.data, tmp_path / "data" / "mine")
    forbidding = manifest("anthropic:claude-sonnet-4-6", forbids=True)
    rewrite(run, config={"data": str(data)}, manifest=forbidding if place == "record" else manifest())
    if place == "disk":
        layout.DataFolder(data).manifest.write_text(forbidding.model_dump_json())
    said = refused(hub, run, InputError, "do not let them be published", data=True)
    assert "--data" in said
    share(ShareConfig(run=run, repo=REPO))
    assert not any(name.startswith("data/") for name in hub.repos[REPO].files)


def test_other_rows_than_those_trained_on(hub: HubApi, run: Path, trained: Trained, tmp_path: Path) -> None:
    data = shutil.copytree(trained.data, tmp_path / "data" / "mine")
    rewrite(run, config={"data": str(data)})
    with (data / "train.jsonl").open("a") as file:
        file.write('{"messages": []}\n')
    refused(hub, run, InputError, r"train\.jsonl: these are not the rows", data=True)
    (data / "train.jsonl").unlink()
    refused(hub, run, InputError, r"train\.jsonl: no such file", data=True)


# The base


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (ModelRecord(spec="/home/me/base", source="folder", path="/home/me/base", name="base"), "a folder"),
        (ModelRecord(spec="base.gguf", source="gguf", path="/cache/ab", name="base"), "a GGUF file"),
    ],
)
def test_an_adapter_whose_base_has_no_name(hub: HubApi, run: Path, model: ModelRecord, what: str) -> None:
    rewrite(run, model=model)
    for publication in ("adapter", "both"):
        said = refused(hub, run, ModelError, f"cannot be named to others: it was {what}", what=publication)
        assert "--what fused" in said
    shared = share(ShareConfig(run=run, repo=REPO, what="fused"))
    assert "base_model" not in shared.card
    assert "a model without a name on the Hub" in shared.card
    assert "state no licence" in shared.card
    assert "/home/me" not in shared.card


@pytest.mark.parametrize(
    ("changes", "hub_id", "spec"),
    [
        ({"spec": "labs/m", "source": "hub", "revision": "a" * 40}, "labs/m", f"labs/m@{'a' * 40}"),
        ({"spec": "labs/m@v1", "source": "hub", "revision": "a" * 40}, "labs/m", f"labs/m@{'a' * 40}"),
        ({"spec": "labs/m@v1", "source": "hub", "revision": None}, "labs/m", "labs/m"),
        (
            {"spec": "smollm2-135m", "source": "hub", "revision": "b" * 40},
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            f"HuggingFaceTB/SmolLM2-135M-Instruct@{'b' * 40}",
        ),
        (
            {"spec": "smollm2-135m", "source": "bundled", "revision": "c" * 64},
            "HuggingFaceTB/SmolLM2-135M-Instruct",
            "smollm2-135m",
        ),
        (
            {
                "spec": "here",
                "source": "folder",
                "path": f"/x/models--labs--m-1.5B--it/snapshots/{'d' * 40}",
                "revision": "e" * 64,
            },
            "labs/m-1.5B--it",
            f"labs/m-1.5B--it@{'d' * 40}",
        ),
    ],
)
def test_a_base_is_named_so_that_the_same_weights_are_found(changes: dict[str, Any], hub_id: str, spec: str) -> None:
    base = name_base(ModelRecord.model_validate({"name": "m", "path": "/home/me/m", **changes}))
    assert base is not None
    assert (base.hub_id, base.record.spec, base.record.path) == (hub_id, spec, "")
    assert name_base(base.record) == base


# Damage


@pytest.mark.parametrize("damage", [lambda b: b[:-3], lambda b: b"", lambda b: b"\x80\x04" + b[2:], lambda b: b + b"x"])
def test_a_damaged_adapter(hub: HubApi, run: Path, damage: Any) -> None:
    path = run / "adapters.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    said = refused(hub, run, InputError, "not a whole safetensors file")
    assert str(path) in said


@pytest.mark.parametrize(
    "settings",
    [
        "no json",
        "[]",
        "{}",
        '{"num_layers": 2, "lora_parameters": {"rank": 0, "scale": 1}}',
        '{"num_layers": 2, "lora_parameters": {"rank": 5, "scale": 2.0}}',
        '{"num_layers": 2, "lora_parameters": {"rank": 4, "scale": NaN}}',
        '{"fine_tune_type": "full", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2.0}}',
        '{"num_layers": 99999999, "lora_parameters": {"rank": 4, "scale": 2.0}}',
    ],
)
def test_a_configuration_that_is_not_the_adapters(hub: HubApi, run: Path, settings: str) -> None:
    (run / "adapter_config.json").write_text(settings)
    refused(hub, run, InputError, r"adapter_config\.json|rank 5")


def test_weights_without_factors(hub: HubApi, run: Path) -> None:
    weights = load_file(run / "adapters.safetensors")
    save_file({f"x{at}": value for at, value in enumerate(weights.values())}, run / "adapters.safetensors")
    refused(hub, run, InputError, "no LoRA factors")


def test_a_fused_model_of_another_adapter(hub: HubApi, run: Path) -> None:
    weights = load_file(run / "adapters.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, run / "adapters.safetensors")
    refused(hub, run, ModelError, "fused from another adapter", what="fused")
    share(ShareConfig(run=run, repo=REPO, dry_run=True))


def test_a_fused_model_that_is_not_there(hub: HubApi, run: Path) -> None:
    shutil.rmtree(run / "fused")
    assert "mlx-distill fuse" in refused(hub, run, InputError, "no such file", what="both")


def test_code_and_pickles_in_the_fused_folder_stay_here(hub: HubApi, run: Path) -> None:
    for name in ("modeling.py", "pytorch_model.bin", "model.pt", ".hidden.json", "notes.md"):
        (run / "fused" / name).write_bytes(b"x")
    share(ShareConfig(run=run, repo=REPO, what="fused"))
    assert not {"modeling.py", "pytorch_model.bin", "model.pt", ".hidden.json", "notes.md"} & set(hub.repos[REPO].files)
