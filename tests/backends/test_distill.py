"""The loss of distillation: against the plain formula on whole logits, value and gradient, and against its limits."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_distill.backends.mlx.distill import eager_distill, evaluate_distill, fused_distill, plain_distill
from mlx_distill.backends.mlx.head import Head, fused_loss
from mlx_distill.batches import TeacherBuckets
from mlx_distill.distillation import Objective

WORDS, WIDTH, POSITIONS = 50, 16, 23

OBJECTIVES = [
    Objective(kind, weight, temperature, beta)  # type: ignore[arg-type]
    for kind, weight, temperature in itertools.product(("forward-kl", "reverse-kl", "jsd"), (1.0, 0.3), (1.0, 2.5, 0.7))
    for beta in ((0.5, 0.1, 0.9) if kind == "jsd" else (0.5,))
]


def name_of(objective: Objective) -> str:
    return f"{objective.divergence}-{objective.weight}-{objective.temperature}-{objective.beta}"


@pytest.fixture(params=["tied", "untied", "bias"])
def head(request: pytest.FixtureRequest) -> Head:
    mx.random.seed(1)
    module: Any = (
        nn.Embedding(WORDS, WIDTH) if request.param == "tied" else nn.Linear(WIDTH, WORDS, bias=request.param == "bias")
    )
    module.update({name: mx.random.normal(value.shape) for name, value in module.parameters().items()})
    return Head(module)


def questions(seed: int = 0) -> tuple[mx.array, mx.array, np.ndarray]:
    random = np.random.default_rng(seed)
    hidden = mx.array(random.standard_normal((POSITIONS, WIDTH)).astype(np.float32))
    targets = mx.array(random.integers(0, WORDS, POSITIONS).astype(np.int32))
    return hidden, targets, random.standard_normal((POSITIONS, WORDS)).astype(np.float64) * 3


def buckets(logits: np.ndarray, k: int) -> TeacherBuckets:
    """A teacher's k likeliest words, and the rest."""
    whole = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    ids = np.sort(np.argsort(-whole, axis=-1)[:, :k], axis=-1)
    named = np.take_along_axis(whole, ids, axis=-1)
    if k == whole.shape[1]:
        return TeacherBuckets(ids.astype(np.int32), named.astype(np.float32))
    rest = np.log(np.where(_mask(ids, whole.shape[1]), 0, np.exp(whole)).sum(axis=-1, keepdims=True))
    return TeacherBuckets(ids.astype(np.int32), np.concatenate([named, rest], axis=-1).astype(np.float32))


def _mask(ids: np.ndarray, words: int) -> np.ndarray:
    mask = np.zeros((len(ids), words), bool)
    np.put_along_axis(mask, ids, True, axis=-1)
    return mask


def formula(logits: mx.array, targets: mx.array, teacher: TeacherBuckets, objective: Objective) -> mx.array:
    """The definition, written as it is read, on whole logits, for MLX to differentiate."""
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    q = mx.exp(logs)
    student = mx.take_along_axis(q, mx.array(teacher.ids), axis=-1)
    if teacher.has_rest:
        away = mx.array(~_mask(teacher.ids, logits.shape[1]))
        student = mx.concatenate([student, (q * away).sum(axis=-1, keepdims=True)], axis=-1)
    student = student ** (1 / objective.temperature)
    student = student / student.sum(axis=-1, keepdims=True)
    p = mx.exp(mx.array(teacher.log_probs)) ** (1 / objective.temperature)
    p = p / p.sum(axis=-1, keepdims=True)

    def kl(a: mx.array, b: mx.array) -> mx.array:
        return (a * (mx.log(a) - mx.log(b))).sum()

    if objective.divergence == "forward-kl":
        apart = kl(p, student)
    elif objective.divergence == "reverse-kl":
        apart = kl(student, p)
    else:
        middle = objective.beta * p + (1 - objective.beta) * student
        apart = objective.beta * kl(p, middle) + (1 - objective.beta) * kl(student, middle)
    entropy = -mx.take_along_axis(logs, targets[:, None], axis=-1).sum()
    return (1 - objective.weight) * entropy + objective.weight * apart


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
@pytest.mark.parametrize("k", [1, 5, WORDS - 1, WORDS])
def test_value_and_gradient_are_those_of_the_formula(head: Head, objective: Objective, k: int) -> None:
    hidden, targets, logits = questions()
    teacher = buckets(logits, k)
    arrays = mx.array(teacher.ids), mx.array(teacher.log_probs)
    expected, slope = mx.value_and_grad(lambda h: formula(head.logits(h), targets, teacher, objective))(hidden)

    def fused(h: mx.array) -> mx.array:
        return fused_distill(head, h, targets, arrays, objective, chunk=7)[0]

    def plain(h: mx.array) -> mx.array:
        return plain_distill(head.logits(h), targets, arrays, objective)[0]

    scale = float(mx.abs(slope).max().item())
    for way in (fused, plain):
        value, gradient = mx.value_and_grad(way)(hidden)
        assert value.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
        np.testing.assert_allclose(np.array(gradient), np.array(slope), atol=1e-5 * scale, rtol=1e-4)
    entropy, apart, correct, gradient = eager_distill(
        head, hidden, targets, teacher, objective, with_gradient=True, chunk=7
    )
    assert gradient is not None
    assert objective.combine(entropy, apart) == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(np.array(gradient), np.array(slope), atol=1e-5 * scale, rtol=1e-4)
    found = [value.item() for value in evaluate_distill(head, hidden, targets, arrays, objective, chunk=7)]
    assert found == pytest.approx([entropy, apart, correct], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
@pytest.mark.parametrize("k", [1, 5, WORDS])
def test_its_teachers_copy_stays_as_it_is(head: Head, objective: Objective, k: int) -> None:
    hidden, targets, _ = questions()
    logits = np.array(head.logits(hidden)).astype(np.float64)
    alone = Objective(objective.divergence, 1.0, objective.temperature, objective.beta)
    teacher = buckets(logits, k)
    _, apart, _, gradient = eager_distill(head, hidden, targets, teacher, alone, with_gradient=True)
    assert gradient is not None
    assert abs(apart) < 1e-4 * POSITIONS
    assert float(mx.abs(gradient).max().item()) < 1e-4


@pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
def test_a_divergence_is_never_negative_and_has_no_bound_below_by_chance(objective: Objective) -> None:
    mx.random.seed(2)
    head = Head(nn.Linear(WIDTH, WORDS))
    for seed in range(5):
        hidden, targets, logits = questions(seed)
        _, apart, _, _ = eager_distill(
            head, hidden * 5, targets, buckets(logits * 4, 5), objective, with_gradient=False
        )
        assert apart > 0


def test_of_a_certain_teacher_the_forward_divergence_is_the_cross_entropy(head: Head) -> None:
    hidden, targets, _ = questions()
    certain = np.full((POSITIONS, WORDS), -60.0)
    certain[np.arange(POSITIONS), np.array(targets)] = 0.0
    for k in (1, 5):
        teacher = buckets(certain, k)
        loss, correct = fused_loss(head, hidden, targets)
        entropy, apart, right, _ = eager_distill(
            head, hidden, targets, teacher, Objective("forward-kl"), with_gradient=False
        )
        assert apart == pytest.approx(loss.item(), rel=1e-5)
        assert entropy == pytest.approx(loss.item(), rel=1e-5)
        assert right == int(correct.item())


def test_a_rest_that_is_next_to_nothing_loses_no_digit(head: Head) -> None:
    """Where both are all but certain, one less the other buckets would leave nothing of the rest."""
    _, targets, logits = questions()
    hidden = mx.array(np.random.default_rng(4).standard_normal((POSITIONS, WIDTH)).astype(np.float32)) * 12
    teacher = buckets(logits * 4, 5)
    objective = Objective("forward-kl")
    own = np.array(head.logits(hidden)).astype(np.float64)
    whole = own - np.log(np.exp(own - own.max(-1, keepdims=True)).sum(-1, keepdims=True)) - own.max(-1, keepdims=True)
    rest = np.log(np.where(_mask(teacher.ids, WORDS), 0, np.exp(whole)).sum(-1))
    p = np.exp(teacher.log_probs.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    q = np.concatenate([np.take_along_axis(whole, teacher.ids, -1), rest[:, None]], axis=-1)
    q -= np.log(np.exp(q).sum(-1, keepdims=True))
    _, apart, _, _ = eager_distill(head, hidden, targets, teacher, objective, with_gradient=False)
    assert apart == pytest.approx(float((p * (np.log(p) - q)).sum()), rel=1e-4)


def test_the_memory_of_a_batch_is_a_chunks() -> None:
    """Sixteen chunks of positions take hardly more than one: their logits are not there at once."""
    mx.random.seed(3)
    words, width = 4000, 8
    head = Head(nn.Linear(width, words))
    peaks = []
    for positions in (256, 16 * 256):
        random = np.random.default_rng(0)
        hidden = mx.array(random.standard_normal((positions, width)).astype(np.float32))
        targets = mx.zeros((positions,), mx.int32)
        ids = np.tile(np.arange(4, dtype=np.int32), (positions, 1))
        teacher = mx.array(ids), mx.full((positions, 5), np.log(0.2))
        mx.eval(hidden, targets, *teacher)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(lambda h, t=targets, b=teacher: fused_distill(head, h, t, b, Objective("jsd"))[0])(hidden))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 2 * peaks[0]
