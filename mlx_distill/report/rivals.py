"""Other runs' students beside this one's: read from their own comparisons, on the prompts that both asked.

Reads: what `evidence` reads, of each further comparison.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_distill.errors import InputError
from mlx_distill.records import CONTENDERS, Prompt, content_hash
from mlx_distill.report.evidence import Evidence, Rival, read_evidence
from mlx_distill.report.intervals import Estimate
from mlx_distill.report.objective import Objective, paired_change
from mlx_distill.report.scores import Scorecard
from mlx_distill.report.scores import paired_change as paired_scores
from mlx_distill.report.wording import plural

_SETTINGS = {
    "max_tokens": "token budget",
    "temperature": "temperature",
    "repetition_penalty": "repetition penalty",
    "samples": "samples",
}


@dataclass(frozen=True)
class Versus:
    """Another run's student − this one, paired on the prompts that both answered.

    Attributes:
        passes: Of pass@1; None where none of those prompts was tested.
        scores: Of the overall score, by judge.
    """

    rival: Rival
    passes: Estimate | None
    scores: dict[str, Estimate]


def with_rivals(evidence: Evidence, roots: Sequence[Path]) -> Evidence:
    """The evidence with the distilled students of other comparisons among the contenders.

    Raises:
        InputError: A comparison has no student's answers, or asked none of these prompts.
    """
    for root in roots:
        evidence = _joined(evidence, read_evidence(root))
    return evidence


def rivals_of(evidence: Evidence, cards: Sequence[Scorecard], objective: Objective | None) -> tuple[Versus, ...]:
    """Each other run's student against this one."""
    families = {p.id: p.family for p in evidence.prompts}
    found = []
    for rival in evidence.rivals:
        scores = {
            card.judge.spec: change
            for card in cards
            if (change := paired_scores(card.prompts, families, rival.contender, "distilled"))
        }
        passes = paired_change(objective.tasks, rival.contender, "distilled") if objective else None
        found.append(Versus(rival, passes, scores))
    return tuple(found)


def _joined(ours: Evidence, theirs: Evidence) -> Evidence:
    root = theirs.folder.root
    if "distilled" not in theirs.contenders:
        raise InputError("has no answers of a distilled student.", path=root, hint="Leave it out of --against.")
    asked = {p.id: _question(p) for p in ours.prompts}
    shared = {p.id for p in theirs.prompts if asked.get(p.id) == _question(p)}
    shared &= {g.prompt.id for g in theirs.of("distilled")}
    if not shared:
        raise InputError(
            f"its student answered none of the prompts of {ours.folder.root}.",
            path=root,
            hint="Compare both runs on the same prompts, or leave it out of --against.",
        )
    name = _free_name(theirs.name, ours.contenders)
    own = {"contender": name}
    rival = Rival(name, root, len(shared), _differences(ours, theirs, len(shared)))
    tasks = {o.outcome.task_id: o.task_sha256 for o in ours.outcomes}
    rows = {loss.row_sha256 for loss in ours.losses}
    prompts = {p.id: p for p in ours.prompts}
    return dataclasses.replace(
        ours,
        generations=(
            *ours.generations,
            *(
                g.model_copy(update={**own, "prompt": prompts[g.prompt.id]})
                for g in theirs.of("distilled")
                if g.prompt.id in shared
            ),
        ),
        samples=(
            *ours.samples,
            *(g.model_copy(update=own) for g in theirs.samples if g.contender == "distilled" and g.prompt.id in shared),
        ),
        verdicts=(
            *ours.verdicts,
            *(
                v.model_copy(update=own)
                for v in theirs.verdicts
                if v.contender == "distilled" and v.prompt_id in shared and v.judge in ours.judges
            ),
        ),
        outcomes=(
            *ours.outcomes,
            # Tested by other tests, an answer says nothing beside ours.
            *(
                o.model_copy(update=own)
                for o in theirs.outcomes
                if o.contender == "distilled"
                and o.outcome.task_id in shared
                and tasks.get(o.outcome.task_id) == o.task_sha256
            ),
        ),
        losses=(
            *ours.losses,
            *(
                loss.model_copy(update=own)
                for loss in theirs.losses
                if loss.contender == "distilled" and loss.row_sha256 in rows
            ),
        ),
        rivals=(*ours.rivals, rival),
    )


def _question(prompt: Prompt) -> str:
    return content_hash([prompt.system, prompt.text])


def _free_name(name: str, taken: Sequence[str]) -> str:
    """The comparison's name as a contender may be called, with a number where another is called so."""
    bare = re.sub(r"[^A-Za-z0-9._-]+", "-", name).lstrip("._-")[:36] or "run"
    used = {*taken, *CONTENDERS}
    return next(free for n in range(1, 1000) if (free := bare if n == 1 else f"{bare}-{n}") not in used)


def _differences(ours: Evidence, theirs: Evidence, shared: int) -> tuple[str, ...]:
    found = []
    if shared < len(ours.prompts):
        found.append(f"asked {shared} of these {plural(len(ours.prompts), 'prompt')}; its means are over those alone.")
    base, other = ours.models.get("base"), theirs.models.get("base")
    if base != other:
        found.append(f"its base is {other or 'not known'}, not {base or 'known here'}: more than training differs.")
    if ours.record and theirs.record:
        for field, title in _SETTINGS.items():
            one, another = getattr(ours.record, field), getattr(theirs.record, field)
            if one != another:
                found.append(f"answered with {title} {another:g}, not {one:g}.")
    return tuple(found)
