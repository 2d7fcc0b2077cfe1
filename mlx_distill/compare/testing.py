"""What the tests make of the answers: `outcomes.jsonl`, made anew only for answers and tasks that have changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing

from mlx_distill import layout
from mlx_distill.config import Confinement
from mlx_distill.evaluation import EvalTask, score_answers
from mlx_distill.evaluation.scoring import scoring_sha256
from mlx_distill.progress import Progress
from mlx_distill.records import Generation
from mlx_distill.scores import ScoredAnswer


def run_tests(
    rows: Sequence[Generation],
    tasks: Mapping[str, EvalTask],
    folder: layout.ComparisonFolder,
    *,
    sandbox: Confinement,
    progress: Progress,
) -> list[ScoredAnswer]:
    """Score every answer to a task that has no outcome yet; the file then holds those of the present answers alone.

    Args:
        rows: In the order in which the file shall have them.

    Raises:
        DependencyError, IsolationError: Programs cannot be run safely here, or not as is asked.
    """
    hashes = {name: scoring_sha256(task) for name, task in tasks.items()}
    kept = {_key(row): row for row in layout.read_rows(folder.outcomes, ScoredAnswer)}
    answers = [row for row in rows if row.prompt.id in tasks]
    todo = [row for row in answers if _wanted(row, hashes) not in kept]
    if todo:
        layout.drop_torn_line(folder.outcomes)
    pairs = ((tasks[row.prompt.id], row.text) for row in todo)
    with closing(score_answers(pairs, sandbox=sandbox, progress=progress)) as outcomes:
        for row, outcome in zip(todo, outcomes, strict=True):
            task = tasks[row.prompt.id]
            found = ScoredAnswer(
                contender=row.contender,
                sample=row.sample,
                answer_sha256=row.answer_sha256,
                task_sha256=hashes[task.id],
                family=task.family,
                difficulty=task.difficulty,
                objective=task.objective,
                outcome=outcome,
            )
            layout.append_row(folder.outcomes, found)
            kept[_key(found)] = found
    present = [kept[_wanted(row, hashes)] for row in answers]
    layout.write_text(folder.outcomes, "".join(row.to_json() + "\n" for row in present))
    return present


_Key = tuple[str, int, str, str, str]


def _key(row: ScoredAnswer) -> _Key:
    return row.contender, row.sample, row.outcome.task_id, row.answer_sha256, row.task_sha256


def _wanted(row: Generation, hashes: Mapping[str, str]) -> _Key:
    return row.contender, row.sample, row.prompt.id, row.answer_sha256, hashes[row.prompt.id]
