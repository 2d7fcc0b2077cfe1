"""Whether the code of answers holds: of answers to tasks by their hidden tests, of all others by running it.

Reads: the file of tasks, where the prompts come from one. What it holds beside its prompts goes nowhere from here:
neither to a teacher nor into a row or the manifest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlx_distill.collect.reading import FromLedger, answer, whole
from mlx_distill.config import CollectConfig
from mlx_distill.errors import InputError
from mlx_distill.evaluation.tasks import EvalTask, is_task_file, load_tasks
from mlx_distill.ledger import Ledger
from mlx_distill.manifest import VerificationSummary
from mlx_distill.progress import Progress

FAILING_CODE, FAILING_TESTS = "failing code", "failing tests"


def verify(
    ledger: Ledger, keys: Sequence[str], config: CollectConfig, progress: Progress
) -> tuple[VerificationSummary, dict[str, str]]:
    """Run the code of answers.

    Args:
        keys: Of answers that the ledger holds.

    Returns:
        What came of it, and key → why an answer fails.

    Raises:
        InputError: The file of tasks is no longer the one that was asked.
        IsolationError, DependencyError: Nothing can be run as asked for.
    """
    tasks = _tasks_of(ledger, keys, config.prompts)
    tested, failing_tests = _test(ledger, tasks, config, progress)
    ran, failing_code = _run(ledger, [key for key in keys if key not in tasks], config, progress)
    failing = {**failing_tests, **failing_code}
    entries = FromLedger(ledger, [key for key in keys if key in failing], whole)
    summary = VerificationSummary(
        passed=tested.passed + ran.passed,
        failed=tested.failed + ran.failed,
        without_code=ran.without_code,
        tests=tested.tests + ran.tests,
        isolation=", ".join(sorted({level for level in (tested.isolation, ran.isolation) if level})) or None,
        failing=tuple(dict.fromkeys(entry.request.prompt_id for entry in entries.values())),
    )
    return summary, failing


def _tasks_of(ledger: Ledger, keys: Sequence[str], path: Path) -> dict[str, EvalTask]:
    """By key the task whose hidden tests decide; none where the prompts are bare, or the task has no tests."""
    if not is_task_file(path):
        return {}
    by_prompt = {task.prompt: task for task in load_tasks(path)}
    found: dict[str, EvalTask] = {}
    for key, entry in FromLedger(ledger, keys, whole).items():
        task = by_prompt.get(entry.request.messages[-1].content or "")
        if task is None:
            raise InputError(
                f"the task {entry.request.prompt_id} was changed while it was collected.",
                path=path,
                hint="The same command asks what is new; no answer is lost.",
            )
        if task.objective:
            found[key] = task
    return found


def _test(
    ledger: Ledger, tasks: Mapping[str, EvalTask], config: CollectConfig, progress: Progress
) -> tuple[VerificationSummary, dict[str, str]]:
    from mlx_distill.evaluation.scoring import score_answers

    answers = FromLedger(ledger, list(tasks), answer)
    outcomes = list(
        score_answers(((tasks[key], text) for key, text in answers.items()), sandbox=config.sandbox, progress=progress)
    )
    levels = {outcome.isolation for outcome in outcomes if outcome.isolation}
    failing = [key for key, outcome in zip(tasks, outcomes, strict=True) if not outcome.passed]
    summary = VerificationSummary(
        passed=len(outcomes) - len(failing),
        failed=len(failing),
        without_code=0,  # Which is failing, where code was asked for.
        tests=sum(outcome.tests for outcome in outcomes if outcome.isolation),
        isolation=", ".join(sorted(levels)) or None,
    )
    return summary, dict.fromkeys(failing, FAILING_TESTS)


def _run(
    ledger: Ledger, keys: Sequence[str], config: CollectConfig, progress: Progress
) -> tuple[VerificationSummary, dict[str, str]]:
    from mlx_distill.quality.verify import verify_answers

    found = verify_answers(FromLedger(ledger, keys, answer), sandbox=config.sandbox, progress=progress)
    outcomes = Counter(verification.passed for verification in found.values())
    levels = {verification.isolation for verification in found.values() if verification.isolation}
    summary = VerificationSummary(
        passed=outcomes[True],
        failed=outcomes[False],
        without_code=outcomes[None],
        tests=sum(verification.tests for verification in found.values()),
        isolation=", ".join(sorted(levels)) or None,
    )
    failing = [key for key, verification in found.items() if verification.passed is False]
    return summary, dict.fromkeys(failing, FAILING_CODE)
