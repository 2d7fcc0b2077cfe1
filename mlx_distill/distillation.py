"""What a student is drawn to when it learns a teacher's distribution and not its text alone.

At each position that carries loss a teacher's K likeliest words are known, each with its probability, and how much is
left for all other words together. That rest is one more bucket, for teacher and student alike, so that the
probabilities of both sum to one. With P the teacher's buckets and Q the student's:

    forward-kl   KL(P‖Q): the student covers what the teacher says
    reverse-kl   KL(Q‖P): the student says what the teacher would
    jsd          β KL(P‖M) + (1 − β) KL(Q‖M), M = βP + (1 − β)Q: between the two (Agarwal et al., "On-Policy
                 Distillation of Language Models", 2024, arXiv:2306.13649)

A temperature T is applied to the buckets of both: P is proportional to p^(1/T). Of the whole vocabulary that is the
softmax of the logits over T. There is no factor T²: the weight is there for that.

    loss = (1 − weight) · cross-entropy + weight · divergence
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from mlx_distill.config import TrainConfig

Divergence = Literal["forward-kl", "reverse-kl", "jsd"]


@dataclass(frozen=True)
class Objective:
    """What is minimised.

    Attributes:
        weight: Of the divergence against the cross-entropy, 0 to 1.
        temperature: Above 0.
        beta: Of `jsd`, between 0 and 1.
    """

    divergence: Divergence
    weight: float = 1.0
    temperature: float = 1.0
    beta: float = 0.5

    @classmethod
    def of(cls, config: TrainConfig) -> Objective | None:
        """That of a training; None where it learns from text alone."""
        if config.distill == "off":
            return None
        return cls(config.distill, config.distill_weight, config.distill_temperature, config.distill_beta)

    def without_text(self) -> Objective:
        """The same of the divergence alone."""
        return replace(self, weight=1.0)

    def combine(self, cross_entropy: float, divergence: float) -> float:
        """The loss, from its two parts."""
        return (1 - self.weight) * cross_entropy + self.weight * divergence
