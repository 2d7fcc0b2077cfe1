"""The YAML at the head of a model card, by which the Hub files a model."""

from __future__ import annotations

from pathlib import PurePath
from typing import TYPE_CHECKING

from mlx_distill.config import ShareConfig
from mlx_distill.run_records import RunRecord
from mlx_distill.share.base import Base
from mlx_distill.share.cleaning import short
from mlx_distill.share.scores import Score, Scores

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

#: Licences that the Hub knows by these names; any other is `other`, with a name of its own.
_LICENCES = frozenset(
    (
        *("apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m"),
        *("bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd"),
        *("bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0"),
        *("cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0"),
        *("cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),
        *("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0"),
        *("cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1"),
        *("eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc"),
        *("h-research", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0"),
        *("odc-by", "odbl", "openmdw-1.0", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa"),
        *("unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license"),
        *("fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3"),
        *("llama4", "grok2-community", "gemma", "unknown"),
    )
)


def front_matter(config: ShareConfig, run: RunRecord, base: Base | None, scores: Scores | None) -> str:
    """As YAML, without the lines around it.

    Args:
        run: As it is published.
    """
    from huggingface_hub import ModelCardData

    licence = run.model.licence.lower() if run.model.licence else None
    known = licence is None or licence in _LICENCES
    results = [*_losses(run), *_scores(scores)]
    data = ModelCardData(
        base_model=base.hub_id if base else None,
        base_model_relation=None if base is None else "adapter" if config.what == "adapter" else "finetune",
        library_name="mlx",
        pipeline_tag="text-generation",
        license=licence if known else "other",
        license_name=None if known else licence,
        license_link=None if known or base is None else f"https://huggingface.co/{base.hub_id}",
        tags=["mlx", "mlx-distill", "distillation", "dora" if run.config.get("adapter") == "dora" else "lora"],
        datasets=[_data_set(run)],
        model_name=config.repo.rpartition("/")[2],
        eval_results=results or None,
    )
    if not results:
        data.pop("model_name")
    return data.to_yaml()


def _data_set(run: RunRecord) -> str:
    if run.manifest:
        return run.manifest.name
    return PurePath(str(run.config.get("data", "data"))).name or "data"


def _losses(run: RunRecord) -> list[EvalResult]:
    name = _data_set(run)
    found = [
        ("valid", "loss", "Validation loss", run.valid_loss),
        ("valid", "accuracy", "Validation token accuracy", run.token_accuracy),
        ("test", "loss", "Test loss", run.test_loss),
    ]
    return [_result(name, split, kind, title, value) for split, kind, title, value in found if value is not None]


def _scores(scores: Scores | None) -> list[EvalResult]:
    if scores is None:
        return []
    prompts = PurePath(scores.record.prompts).stem if scores.record and scores.record.prompts else "held-out prompts"
    return [
        _result(prompts, "test", "score", f"{title}, 0 to 10, by {short(card.judge)}{_between(score)}", score.mean)
        for card in scores.cards
        for score, title in ((card.scores.get("distilled"), "Overall score"), (card.gain, "Overall score − base"))
        if score is not None
    ]


def _between(score: Score) -> str:
    return f", 95 % interval {score.interval.low:.2f} to {score.interval.high:.2f}" if score.interval else ""


def _result(data: str, split: str, kind: str, title: str, value: float) -> EvalResult:
    from huggingface_hub import EvalResult

    return EvalResult(
        task_type="text-generation",
        task_name="Text generation",
        dataset_type=data,
        dataset_name=data,
        dataset_split=split,
        metric_type=kind,
        metric_name=title,
        metric_value=round(value, 4),
    )
