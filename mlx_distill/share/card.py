"""The model card: what is on the disk about a run, for those who find it on the Hub.

It is made of nothing but the files that it tells of, so that publishing the same run twice gives the same card.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Any

from mlx_distill.config import ShareConfig
from mlx_distill.families import same_family
from mlx_distill.manifest import Manifest
from mlx_distill.records import CONTENDERS
from mlx_distill.run_records import RunRecord
from mlx_distill.share.base import Base
from mlx_distill.share.cleaning import short
from mlx_distill.share.contents import CHARTS, COMPARISON_FOLDER, PublishedFile
from mlx_distill.share.front_matter import front_matter
from mlx_distill.share.scores import Score, Scorecard, Scores
from mlx_distill.share.usage import usage

#: Below this many families of prompts a bootstrap is too narrow to be taken at its word.
FEW_FAMILIES = 7

_SETTINGS = (
    *("adapter", "rank", "scale", "rslora", "dropout", "layers", "targets", "optimizer", "learning_rate", "schedule"),
    *("warmup", "final_learning_rate", "weight_decay", "grad_clip", "epochs", "batch_size", "max_length", "seed"),
    "dtype",
)
#: Of a run that learned a distribution.
_DISTILLING = ("distill", "distill_weight", "distill_temperature", "distill_beta", "on_policy")


def model_card(
    config: ShareConfig, run: RunRecord, base: Base | None, scores: Scores | None, files: Sequence[PublishedFile]
) -> str:
    """The whole `README.md`, front matter first.

    Args:
        run: As it is published.
        files: That it stands beside.
    """
    title = config.repo.rpartition("/")[2]
    parts = [
        f"---\n{front_matter(config, run, base, scores)}\n---",
        f"# {title}",
        _summary(config, run, base),
        "## How to run it",
        usage(config, run, base),
        *_results(scores, run),
        *_charts(files),
        "## Base model",
        _base(config, run, base),
        "## Teacher and data",
        *_data(config, run),
        "## Training",
        *_training(run),
        "## Files",
        _table(("File", "Bytes", "SHA-256"), ((f"`{f.name}`", f"{f.size:,}", f"`{f.sha256[:16]}`") for f in files)),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(config: ShareConfig, run: RunRecord, base: Base | None) -> str:
    named = _link(base) if base else f"`{_cell(run.model.name)}`"
    kind = "DoRA" if run.config.get("adapter") == "dora" else "LoRA"
    what = {
        "adapter": f"A {kind} adapter for {named}",
        "fused": f"{named} with a {kind} adapter merged into it",
        "both": f"{named} with a {kind} adapter merged into it, and the adapter alone",
    }[config.what]
    teacher = f", distilled from the answers of `{_cell(run.manifest.teacher)}`" if run.manifest else ""
    return f"{what}{teacher}. Made with mlx-distill {run.version} ({run.backend}) on {_cell(run.device)}."


def _results(scores: Scores | None, run: RunRecord) -> Iterable[str]:
    yield "## Results"
    rows = [
        ("Validation loss before training", _number(run.first_valid_loss)),
        ("Validation loss", _number(run.valid_loss)),
        ("Test loss", _number(run.test_loss)),
        ("Training loss", _number(run.train_loss)),
        ("Divergence from the teacher before training", _number(run.first_divergence)),
        ("Divergence from the teacher", _number(run.divergence)),
        ("Validation token accuracy", "" if run.token_accuracy is None else f"{run.token_accuracy:.1%}"),
    ]
    if known := [row for row in rows if row[1]]:
        apart = "" if run.divergence is None else " Divergences are mean forward KLs, on the validation rows."
        yield f"Losses are mean cross-entropies in nats over the tokens of the teacher's answers.{apart}"
        yield _table(("", "Value"), known)
    if scores is None or not scores.cards:
        yield "Its answers were not judged."
        return
    for card in scores.cards:
        yield from _scorecard(card, scores, run)


def _scorecard(card: Scorecard, scores: Scores, run: RunRecord) -> Iterable[str]:
    yield f"### Scores by {judge_title(short(card.judge), run.manifest)}"
    names = {"teacher": "Teacher", "base": "Base", "distilled": "This model"}
    rows = [
        (names[c], *_score_cells(card.scores[c]), str(scores.cut.get(c, 0))) for c in CONTENDERS if c in card.scores
    ]
    gain = [("This model − base", *_score_cells(card.gain, signed=True), "")] if card.gain else []
    yield _table(("", "Mean, 0 to 10", "95 % interval", "Answers", "Cut by the token budget"), [*rows, *gain])
    if card.gain and card.gain.interval is None:
        yield "All prompts are variations of one, so that there is no interval, and no claim."
    elif card.gain and card.gain.interval and card.gain.interval.spans_zero:
        yield "The interval of the difference holds 0: by these scores it is **not distinguishable** from its base."
    few = f" {card.families} families are few: the intervals are too narrow." if card.families < FEW_FAMILIES else ""
    unread = f" {card.unread} verdicts could not be read and are left out." if card.unread else ""
    prompts = (
        f"`{_cell(PurePath(scores.record.prompts).name)}`" if scores.record and scores.record.prompts else "held out"
    )
    yield (
        f"{scores.prompts} prompts ({prompts}) of {card.families} families; intervals are expanded percentile "
        f"bootstraps (10,000 draws) in which whole families are drawn.{few}{unread}"
    )


def judge_title(judge: str, manifest: Manifest | None) -> str:
    """Who judged, with what has to be known to weigh its word."""
    if judge == "rubric":
        return "a rubric, which is computed and no model's opinion"
    kin = manifest is not None and same_family(judge, manifest.teacher)
    relation = "a model's opinion, and of the teacher's own family" if kin else "a model's opinion"
    return f"`{_cell(judge)}` ({relation})"


def _charts(files: Sequence[PublishedFile]) -> Iterable[str]:
    there = {file.name for file in files}
    for chart in CHARTS:
        if (name := f"{COMPARISON_FOLDER}/{chart}.png") in there:
            yield f"![{chart.replace('_', ' ').capitalize()}]({name})"
    if (name := f"{COMPARISON_FOLDER}/results.md") in there:
        yield f"All scores, prompt by prompt: [{name}]({name})."


def _base(config: ShareConfig, run: RunRecord, base: Base | None) -> str:
    revision = f" at `{run.model.revision[:12]}`" if run.model.revision else ""
    named = _link(base) if base else f"`{_cell(run.model.name)}`, a model without a name on the Hub"
    if run.model.licence:
        licence = f"Its licence is **{_cell(run.model.licence)}**, and holds for this too."
    else:
        licence = "Its files state no licence: find out what it allows before you use or pass this on."
    converted = " Its weights were converted from a quantized GGUF." if base and base.converted else ""
    return f"{named}{revision}.{converted} {licence}"


def _data(config: ShareConfig, run: RunRecord) -> Iterable[str]:
    manifest = run.manifest
    if manifest is None:
        yield "The rows came from a data set without a manifest: who wrote them is not recorded."
    else:
        terms = manifest.terms
        where = f" ([terms]({terms.url}))" if terms.url else ""
        yield f"Teacher: `{_cell(manifest.teacher)}`. Terms: {_cell(terms.licence)}{where}. {_cell(terms.summary)}"
        if terms.requires_acceptance:
            said = "gave their word that they may" if terms.accepted else "did not say that they may"
            yield f"Training on its answers needs the provider's permission; who trained this {said}."
        yield _collection(manifest)
    if run.distilled_from is not None:
        licence = _cell(run.teacher_licence or "not stated by its files")
        yield f"The distribution of `{_cell(run.distilled_from)}` was learned too; its licence: {licence}."
    yield _table(
        ("Split", "Rows", "Tokens", "Tokens learned from", "SHA-256 of the file"),
        (
            (name, f"{s.rows:,}", f"{s.tokens:,}", f"{s.target_tokens:,}", f"`{s.sha256}`")
            for name, s in run.splits.items()
        ),
    )
    yield (
        "The rows are in this repository, under `data/`."
        if config.data
        else "The rows are not published; the hashes tell whether two runs learned from the same ones."
    )


def _collection(manifest: Manifest) -> str:
    dropped = sum(drop.count for drop in manifest.dropped)
    out = f" {dropped} were left out ({_drops(manifest)})." if dropped else ""
    cost = f" They cost ${manifest.cost_usd:,.2f}" if manifest.cost_usd else " They cost nothing"
    dated = f" at the prices of {manifest.prices_dated}" if manifest.cost_usd and manifest.prices_dated else ""
    time = f" and took {_duration(manifest.collection_seconds)}" if manifest.collection_seconds else ""
    answered = f"{manifest.answered:,} of {manifest.asked:,} {manifest.unit} were answered"
    each = f"; each of {manifest.prompts:,} prompts was asked {manifest.samples} times" if manifest.samples > 1 else ""
    return f"{answered}{each}.{out}{cost}{dated}{time}."


def _drops(manifest: Manifest) -> str:
    return ", ".join(f"{_cell(drop.reason)}: {drop.count}" for drop in manifest.dropped if drop.count)


def _training(run: RunRecord) -> Iterable[str]:
    told = (*_SETTINGS, *(_DISTILLING if run.distilled_from else ()))
    yield _table(("Setting", "Value"), ((key, f"`{_cell(str(run.config[key]))}`") for key in told if key in run.config))
    facts = [f"{run.trainable_parameters:,} parameters were trained"]
    if run.seconds is not None:
        facts.append(f"in {_duration(run.seconds)}")
    if run.peak_memory_bytes:
        facts.append(f"with {run.peak_memory_bytes / 1e9:.2f} GB of memory at most")
    if run.tokens_per_second:
        facts.append(f"at {run.tokens_per_second:,.0f} tokens a second")
    ended = " It was stopped early: what was minimised no longer fell." if run.stopped_early else ""
    ended += " It was ended before its last step, as was asked for." if run.cut_short else ""
    best = f" The adapter is that of step {run.best_step} of {run.steps}." if run.best_step is not None else ""
    yield f"{' '.join(facts)}; energy was not measured.{ended}{best}"


def _score_cells(score: Score, *, signed: bool = False) -> tuple[str, str, str]:
    form = "+.2f" if signed else ".2f"
    interval = score.interval
    between = f"{interval.low:{form}} to {interval.high:{form}}" if interval else "—"
    return f"{score.mean:{form}}", between, str(score.n)


def _link(base: Base) -> str:
    return f"[{base.hub_id}](https://huggingface.co/{base.hub_id})"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _cell(text: str) -> str:
    """A text of somebody's own inside a line of Markdown: it opens no tag, no column and no code."""
    for mark, instead in (("`", "'"), ("|", "\\|"), ("<", "&lt;")):
        text = text.replace(mark, instead)
    return " ".join(text.split())


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))
