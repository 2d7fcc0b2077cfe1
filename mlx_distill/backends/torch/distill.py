"""The divergence from a teacher on PyTorch, as the definition reads, on whole logits: a reference."""

from __future__ import annotations

import math

import torch

from mlx_distill.batches import TeacherBuckets
from mlx_distill.distillation import Objective


def divergence_of_logits(logits: torch.Tensor, teacher: TeacherBuckets, objective: Objective) -> torch.Tensor:
    """The divergence, summed over positions, in nats.

    Args:
        logits: (N, V) float32, at the positions that the teacher speaks of.
    """
    ids = torch.from_numpy(teacher.ids).long().to(logits.device)
    logs = logits.log_softmax(-1)
    student = logs.gather(-1, ids)
    if teacher.has_rest:
        others = logs.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        student = torch.cat([student, others], dim=-1)
    given = torch.from_numpy(teacher.log_probs).to(logits.device)
    lq = (student / objective.temperature).log_softmax(-1)
    lp = (given / objective.temperature).log_softmax(-1)
    if objective.divergence == "forward-kl":
        return _kl(lp, lq)
    if objective.divergence == "reverse-kl":
        return _kl(lq, lp)
    beta = objective.beta
    middle = torch.logaddexp(lp + math.log(beta), lq + math.log1p(-beta))
    return beta * _kl(lp, middle) + (1 - beta) * _kl(lq, middle)


def _kl(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.exp() * (a - b)).sum()
