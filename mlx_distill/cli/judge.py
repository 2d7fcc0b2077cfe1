"""`mlx-distill judge`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import JudgeConfig
from mlx_distill.progress import Progress
from mlx_distill.records import CONTENDERS, Contender, Generation, Verdict
from mlx_distill.scores import Duel

if TYPE_CHECKING:
    from mlx_distill.judges.run import Judged

_PROBLEMS_SHOWN = 5


@make_command(
    JudgeConfig,
    examples="""
    mlx-distill judge visuals/demo
    mlx-distill judge visuals/demo --judge anthropic:claude-opus-4-6 --max-cost 2
    mlx-distill judge visuals/demo --judge rubric,anthropic:claude-opus-4-6,mlx:Qwen/Qwen3-8B --pairwise
    mlx-distill judge visuals/demo --calibrate labels.jsonl
    """,
    keeps="Every verdict received is kept; the same command goes on from there.",
)
def command(config: JudgeConfig, progress: Progress) -> Summary:
    """Score the answers of a comparison."""
    if config.calibrate is not None:
        from mlx_distill.cli.calibration import summarise_calibration
        from mlx_distill.judges.calibrate import calibrate

        return summarise_calibration(calibrate(config), config)
    from mlx_distill.judges.run import judge_all, judges_from_spec, latest_generations
    from mlx_distill.layout import ComparisonFolder

    judged = judge_all(config, judges_from_spec(config, progress), progress)
    return summarise(judged, latest_generations(ComparisonFolder(config.comparison)), config)


def summarise(judged: Judged, generations: Sequence[Generation], config: JudgeConfig) -> Summary:
    """What each judge made of it, what is missing, and how far several agree.

    Failed where a judge gave no verdict that can be read.
    """
    from mlx_distill.judges.jury import jury_agreement

    entries = [_entry(name, judged, generations) for name in judged.verdicts]
    lines: list[str] = []
    for name, entry in zip(judged.verdicts, entries, strict=True):
        lines += _lines_of(entry, judged.verdicts[name], judged.unsent.get(name, 0), config)
    agreement = jury_agreement(judged.verdicts)
    if agreement is not None:
        lines += _jury(entries)
        alpha = "not defined" if agreement.alpha is None else f"{agreement.alpha:.2f}"
        lines += [
            f"Agreement of the judges: Krippendorff's alpha {alpha} over {agreement.answers} answers "
            "(1 is full agreement, 0 what chance gives).",
            "",
        ]
    lines += [f"Next:  mlx-distill report {config.comparison}"]
    data = {
        "comparison": str(config.comparison),
        **(entries[0] if len(entries) == 1 else {}),
        "judges": entries,
        "agreement": None if agreement is None else {"alpha": agreement.alpha, "answers": agreement.answers},
    }
    return Summary(
        data, lines, failed=any(entry["verdicts"] and entry["missing"] == entry["verdicts"] for entry in entries)
    )


def _entry(name: str, judged: Judged, generations: Sequence[Generation]) -> dict[str, Any]:
    """One judge in the object of `--json`."""
    from mlx_distill.judges.jury import gap, means

    verdicts = judged.verdicts[name]
    label, kin = _label(name, generations)
    between = gap(verdicts)
    return {
        "judge": name,
        "label": label,
        "same_family": kin,
        "scores": {who: {key: round(value, 3) for key, value in row.items()} for who, row in means(verdicts).items()},
        "gap": None if between is None else {"mean": round(between.mean, 3), "prompts": between.prompts},
        "verdicts": len(verdicts),
        "missing": sum(not verdict.scores for verdict in verdicts),
        "unsent": judged.unsent.get(name, 0),
        "pairs": list(_pairs(judged.duels.get(name, []))),
    }


def _pairs(duels: Sequence[Duel]) -> Iterator[dict[str, Any]]:
    from mlx_distill.judges.duels import pairs_of
    from mlx_distill.verdicts import settled

    for one, other in pairs_of(name for row in duels for name in (row.first, row.second)):
        found = settled(duels, one, other)
        if found:
            yield {
                "of": one,
                "against": other,
                "won": sum(pair.winner == "first" for pair in found),
                "lost": sum(pair.winner == "second" for pair in found),
                "tied": sum(pair.winner == "tie" for pair in found),
                "contradicted": sum(pair.contradicted for pair in found),
                "missing": sum(pair.winner is None for pair in found),
            }


def _lines_of(entry: dict[str, Any], verdicts: Sequence[Verdict], unsent: int, config: JudgeConfig) -> list[str]:
    answers = Counter(verdict.contender for verdict in verdicts if verdict.scores)
    lines = [f"Judge: {entry['label']}.", "", *_table(entry["scores"], answers)]
    for pair in entry["pairs"]:
        notes = [
            f"{pair['contradicted']} of the ties by naming another winner in the other order"
            if pair["contradicted"]
            else "",
            f"{pair['missing']} without a readable choice in both orders" if pair["missing"] else "",
        ]
        note = "; ".join(filter(None, notes))
        lines.append(
            f"{pair['of']} against {pair['against']}: won {pair['won']}, lost {pair['lost']}, tied {pair['tied']}"
            f"{f' ({note})' if note else ''}."
        )
    lines += [""] if entry["pairs"] else []
    missing = [verdict for verdict in verdicts if not verdict.scores]
    if missing:
        counts = ", ".join(f"{name} {n}" for name, n in Counter(v.contender for v in missing).items())
        lines += [
            f"{len(missing)} of {len(verdicts)} verdicts are missing ({counts}); they count as nothing, not as 0:"
        ]
        lines += [
            f"  {verdict.prompt_id}, {verdict.contender}: {verdict.problem}" for verdict in missing[:_PROBLEMS_SHOWN]
        ]
        lines += ["The same command asks again, but for refusals, which stand.", ""]
    if unsent and config.max_cost is not None:
        lines += [
            f"{unsent:,} questions are left: the worst case of one more could pass --max-cost {config.max_cost:g}. "
            "To go on, give the same command with a higher one.",
            "",
        ]
    return lines


def _label(judge: str, generations: Sequence[Generation]) -> tuple[str, bool]:
    from mlx_distill.families import family, same_family

    if judge == "rubric":
        return "rubric (computed from the answers, not a model's opinion)", False
    kin = any(g.contender == "teacher" and same_family(judge, g.model) for g in generations)
    note = f"; of the teacher's own family, {family(judge)}, whose answers it may favour" if kin else ""
    return f"{judge} (a model's opinion{note})", kin


def _table(scores: dict[Contender, dict[str, float]], answers: Counter[str]) -> list[str]:
    from mlx_distill.judges.base import DIMENSIONS

    shown = _ordered(scores)
    if not shown:
        return []
    width = max(len(title) for title in DIMENSIONS.values())
    columns = [max(12, len(name) + 2) for name in shown]
    rows = [f"{'':<{width}}" + "".join(f"{name:>{w}}" for name, w in zip(shown, columns, strict=True))]
    for key, title in {**DIMENSIONS, "overall": "Overall"}.items():
        cells = [f"{scores[name][key]:.1f}" if key in scores[name] else "-" for name in shown]
        rows.append(f"{title:<{width}}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, columns, strict=True)))
    counts = "".join(f"{answers[name]:>{w}}" for name, w in zip(shown, columns, strict=True))
    return [*rows, f"{'Answers scored':<{width}}" + counts, ""]


def _jury(entries: Sequence[dict[str, Any]]) -> list[str]:
    """A row a judge: overall means, and the gap."""
    shown = _ordered(dict.fromkeys(name for entry in entries for name in entry["scores"]))
    head = ["Overall by judge", *shown, "distilled - base"]
    rows = [head]
    for entry in entries:
        cells = [f"{entry['scores'][name]['overall']:.2f}" if name in entry["scores"] else "-" for name in shown]
        gap = entry["gap"]
        rows.append(
            [
                entry["judge"] + (" (teacher's family)" if entry["same_family"] else ""),
                *cells,
                "-" if gap is None else f"{gap['mean']:+.2f} ({gap['prompts']} prompts)",
            ]
        )
    widths = [max(len(row[at]) for row in rows) for at in range(len(head))]
    return [
        *(
            "  ".join(
                [f"{row[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(row[1:], widths[1:], strict=True))]
            )
            for row in rows
        ),
        "",
    ]


def _ordered(contenders: Any) -> list[Contender]:
    return [name for name in CONTENDERS if name in contenders] + [name for name in contenders if name not in CONTENDERS]
