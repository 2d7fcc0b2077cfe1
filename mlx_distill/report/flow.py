"""The run as a Mermaid flow chart, with its own figures on the arrows and boxes."""

from __future__ import annotations

from mlx_distill.report.analysis import Analysis
from mlx_distill.report.findings import cut_counts
from mlx_distill.report.palette import ink
from mlx_distill.report.wording import (
    count,
    duration,
    loss,
    money,
    percent,
    plural,
    score,
    title_of,
    visible,
)


def pipeline(analysis: Analysis) -> str:
    """Mermaid source: what went in, what was made of it, what came out."""
    evidence, cards = analysis.evidence, analysis.cards
    run, manifest, record = evidence.run, evidence.manifest, evidence.record
    teacher = evidence.teacher or "no teacher"
    boxes: dict[str, list[str]] = {"prompts": ["Prompts"], "teacher": ["Teacher", teacher], "data": ["Data set"]}
    if manifest:
        boxes["prompts"].append(f"{count(manifest.prompts)} prompts")
        boxes["teacher"].append(f"{count(manifest.answered)} answers")
        paid = [money(manifest.cost_usd)] if manifest.cost_usd else []
        boxes["teacher"].append(", ".join([*paid, duration(manifest.collection_seconds)]))
    if run:
        boxes["data"] += [f"{plural(split.rows, 'row')} {name}" for name, split in run.splits.items()]
        boxes["base"] = ["Base student", run.model.name]
        boxes["train"] = ["LoRA training", plural(run.epochs, "epoch") + f", {plural(run.steps, 'step')}"]
        boxes["train"].append(f"{count(run.trainable_parameters)} trainable parameters")
        if run.seconds is not None:
            boxes["train"].append(f"{duration(run.seconds)} on {run.device}")
        boxes["distilled"] = ["Distilled student"]
        if run.first_valid_loss is not None and run.valid_loss is not None:
            boxes["distilled"].append(f"validation loss {loss(run.first_valid_loss)} → {loss(run.valid_loss)}")
    else:
        boxes |= {"base": ["Base student"], "train": ["LoRA training"], "distilled": ["Distilled student"]}
    boxes["compare"] = ["Comparison", plural(len(evidence.prompts), "held-out prompt")]
    if record:
        boxes["compare"].append(f"at most {count(record.max_tokens)} tokens an answer")
    cut = sum(k for k, _ in cut_counts(evidence).values())
    if cut:
        boxes["compare"].append(f"{plural(cut, 'answer')} cut")
    if analysis.objective:
        rates = [f"{title_of(c)} {percent(t.pass_1.value)}" for c, t in analysis.objective.contenders.items()]
        boxes["tests"] = ["Hidden tests", plural(len(analysis.objective.tasks), "task"), *rates]
    for number, card in enumerate(cards):
        means = [f"{title_of(c)} {score(m.value)}" for c, m in card.overall.items()]
        boxes[f"judge{number}"] = ["Judge: " + card.judge.full, *(means or ["no verdict could be read"])]

    arrows = ["prompts --> teacher --> data --> train", "base --> train --> distilled --> compare", "base --> compare"]
    if "teacher" in evidence.contenders:
        arrows.append("teacher --> compare")
    if analysis.objective:
        arrows.append("compare --> tests")
    arrows += [f"compare --> judge{number}" for number in range(len(cards))]
    lines = ["flowchart LR"]
    lines += [f'  {name}["{"<br/>".join(_label(text) for text in texts)}"]' for name, texts in boxes.items()]
    lines += [f"  {arrow}" for arrow in arrows]
    for contender in ("base", "distilled", "teacher"):
        lines.append(f"  style {contender} fill:#ffffff,stroke:{ink(contender).light},stroke-width:3px,color:#1b1e24")
    return "\n".join(lines) + "\n"


def _label(text: str) -> str:
    """Foreign text inside a quoted Mermaid label: nothing in it is markup, and nothing ends the quotes."""
    kept = " .,:/+-→()'_%$"
    return "".join(
        c if c.isalnum() or c in kept else f"#{ord(c)};" for c in visible(text).replace("\n", " ").replace("\t", " ")
    )
