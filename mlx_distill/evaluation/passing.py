"""pass@k: the chance that at least one of k answers passes, from n answers of which c do.

The unbiased estimator of Chen et al., "Evaluating Large Language Models Trained on Code" (2021), section 2.1.
"""

from __future__ import annotations

from collections.abc import Iterable


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate pass@k for one task: 1 - C(n - c, k) / C(n, k).

    Args:
        n: Answers.
        c: Those of them that pass.
        k: Answers that one is allowed, at most n.

    Raises:
        ValueError: It is not so that 0 ≤ c ≤ n and 1 ≤ k ≤ n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if c == 0:
        return 0.0
    # The quotient as a product, each factor between 0 and 1: neither binomial is computed, and nothing overflows.
    none_passes = 1.0
    for i in range(min(c, k)):
        none_passes *= max(0, n - max(c, k) - i) / (n - i)
    return 1.0 - none_passes


def mean_pass_at_k(counts: Iterable[tuple[int, int]], k: int) -> float:
    """The mean of pass@k over tasks.

    Args:
        counts: For each task, how many answers it got and how many of them pass.

    Raises:
        ValueError: There are no tasks, or one has fewer than k answers.
    """
    estimates = [pass_at_k(n, c, k) for n, c in counts]
    if not estimates:
        raise ValueError("the mean of pass@k over no tasks is not defined")
    return sum(estimates) / len(estimates)
