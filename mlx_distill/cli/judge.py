"""`mlx-distill judge`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import JudgeConfig
from mlx_distill.progress import Progress
from mlx_distill.records import CONTENDERS, Generation, Verdict


@make_command(
    JudgeConfig,
    examples="""
    mlx-distill judge visuals/demo
    mlx-distill judge visuals/demo --judge anthropic:claude-opus-4-6
    """,
    keeps="Every verdict received is in verdicts.jsonl; the same command goes on from there.",
)
def command(config: JudgeConfig, progress: Progress) -> Summary:
    """Score the answers of a comparison."""
    from mlx_distill.judges.run import judge, judge_from_spec, latest_generations
    from mlx_distill.layout import ComparisonFolder

    opened = judge_from_spec(config, progress)
    verdicts = judge(config, opened, progress)
    return summarise(verdicts, latest_generations(ComparisonFolder(config.comparison)), config)


def summarise(verdicts: Sequence[Verdict], generations: Sequence[Generation], config: JudgeConfig) -> Summary:
    """The means a contender, what is missing, and what has to be known about the judge."""
    from mlx_distill.judges.run import means

    label, kin = _label(config.judge, generations)
    scores = means(verdicts)
    missing = [verdict for verdict in verdicts if not verdict.scores]
    lines = [f"Judge: {label}.", "", *_table(scores, Counter(v.contender for v in verdicts if v.scores))]
    if missing:
        counts = ", ".join(f"{name} {n}" for name, n in Counter(v.contender for v in missing).items())
        lines += [
            f"{len(missing)} of {len(verdicts)} verdicts are missing ({counts}); they count as nothing, not as 0:"
        ]
        lines += [f"  {verdict.prompt_id}, {verdict.contender}: {verdict.problem}" for verdict in missing[:5]]
        lines += ["The same command asks for them again."]
    lines += [f"Next:  mlx-distill report {config.comparison}"]
    data = {
        "comparison": str(config.comparison),
        "judge": config.judge,
        "label": label,
        "same_family": kin,
        "scores": {name: {key: round(value, 3) for key, value in row.items()} for name, row in scores.items()},
        "verdicts": len(verdicts),
        "missing": len(missing),
    }
    return Summary(data, lines, failed=bool(verdicts) and len(missing) == len(verdicts))


def _label(judge: str, generations: Sequence[Generation]) -> tuple[str, bool]:
    from mlx_distill.judges.blind import family, same_family

    if judge == "rubric":
        return "rubric (computed from the answers, not a model's opinion)", False
    kin = any(g.contender == "teacher" and same_family(judge, g.model) for g in generations)
    note = f"; of the teacher's own family, {family(judge)}, whose answers it may favour" if kin else ""
    return f"{judge} (a model's opinion{note})", kin


def _table(scores: dict[str, dict[str, float]], answers: Counter[str]) -> list[str]:
    from mlx_distill.judges.base import DIMENSIONS

    shown = [name for name in CONTENDERS if name in scores] + [name for name in scores if name not in CONTENDERS]
    if not shown:
        return []
    width = max(len(title) for title in DIMENSIONS.values())
    rows = [f"{'':<{width}}" + "".join(f"{name:>12}" for name in shown)]
    for key, title in {**DIMENSIONS, "overall": "Overall"}.items():
        cells = [f"{scores[name][key]:>12.1f}" if key in scores[name] else f"{'-':>12}" for name in shown]
        rows.append(f"{title:<{width}}" + "".join(cells))
    return [*rows, f"{'Answers scored':<{width}}" + "".join(f"{answers[name]:>12}" for name in shown), ""]
