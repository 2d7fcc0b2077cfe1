"""The divergence from a teacher against that of TRL, which others wrote: values, gradients, and what is left out.

`generalized_jsd_loss` of TRL's trainer for generalised knowledge distillation (seen: 1.16.0) and ours read the same
paper (Agarwal et al., 2024, arXiv:2306.13649). What each calls what:

    beta         The teacher's weight, in the mixture as in the sum: ours. At 0 and at 1 themselves, where that sum is
                 nothing, TRL gives KL(teacher‖student) and KL(student‖teacher): our `forward-kl` and `reverse-kl`; our
                 `jsd` takes neither.
    temperature  The logits of both are divided by it, and there is no factor T²: ours, where every word is named.
    reduction    "batchmean" is the sum over words and positions by the count of positions: our mean a token.
                 "sum" is our sum. "none" is by word.
    labels       −100 leaves a position out. It shifts nothing: a label stands where its logits do.

TRL computes in float64 here, as beta in float32 leaves few digits of 1 − beta near 1. It is no requirement of ours:
without it these tests are skipped.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from mlx_distill.backends.base import NO_TOKENS
from mlx_distill.backends.mlx.distill import eager_distill, evaluate_distill, fused_distill, plain_distill
from mlx_distill.backends.mlx.head import Head
from mlx_distill.backends.torch.distill import divergence_of_logits
from mlx_distill.backends.torch.student import TorchStudent
from mlx_distill.batches import Batch, TeacherBuckets, make_batch
from mlx_distill.distillation import Objective
from tests.backends.students import random_rows, student
from tests.tiny import make_tiny_model
from tests.training.runs import settings

pytest.importorskip("trl")

with warnings.catch_warnings():
    # That it is experimental, and whatever those have to say that it imports.
    warnings.simplefilter("ignore")
    from trl.experimental.gkd import GKDTrainer

Floats = NDArray[np.float64]

WORDS, WIDTH, POSITIONS = 61, 16, 19

#: Nearer to 0 or 1, float32 leaves too little of the difference of two all but equal logarithms.
BETAS = (0.5, 0.1, 0.9, 0.01, 0.99, 1e-3, 1 - 1e-3)

OBJECTIVES = [
    *(Objective(kind, 1.0, t) for kind in ("forward-kl", "reverse-kl") for t in (1.0, 2.5, 0.7)),
    *(Objective("jsd", 1.0, t, beta) for beta, t in itertools.product(BETAS, (1.0, 2.5, 0.7))),
]


def name_of(objective: Objective) -> str:
    beta = f"-{objective.beta:g}" if objective.divergence == "jsd" else ""
    return f"{objective.divergence}{beta}-{objective.temperature:g}"


each_objective = pytest.mark.parametrize("objective", OBJECTIVES, ids=name_of)
#: Size of the logits, and how far a teacher's are from them: nearly even, unlike each other, and all but certain.
SHAPES = {"even": (0.3, 0.3), "unlike": (3.0, 4.0), "certain": (40.0, 4.0)}
each_shape = pytest.mark.parametrize("shape", SHAPES)


def trl_beta(objective: Objective) -> float:
    """What TRL is told, to compute the same."""
    return {"forward-kl": 0.0, "reverse-kl": 1.0}.get(objective.divergence, objective.beta)


def of_trl(student: torch.Tensor, teacher: Floats, objective: Objective, **more: Any) -> torch.Tensor:
    """TRL's, in float64."""
    return GKDTrainer.generalized_jsd_loss(
        student, torch.from_numpy(teacher), beta=trl_beta(objective), temperature=objective.temperature, **more
    )


def value_and_slope(student: Floats, teacher: Floats, objective: Objective) -> tuple[float, Floats]:
    """TRL's sum over positions, and its gradient in the student's logits."""
    at = torch.tensor(student, requires_grad=True)
    value = of_trl(at, teacher, objective, reduction="sum")
    value.backward()
    assert at.grad is not None
    return value.item(), at.grad.numpy()


def log_softmax(logits: Floats) -> Floats:
    logits = logits - logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def buckets(logits: Floats) -> TeacherBuckets:
    """Every word named: nothing is left for a rest."""
    ids = np.broadcast_to(np.arange(logits.shape[-1], dtype=np.int32), logits.shape)
    return TeacherBuckets(np.ascontiguousarray(ids), log_softmax(logits).astype(np.float32))


def drawn(shape: str) -> Floats:
    """Logits of a student, as float32 holds them."""
    random = np.random.default_rng(0)
    return (random.standard_normal((POSITIONS, WORDS)) * SHAPES[shape][0]).astype(np.float32).astype(np.float64)


def taught(student: Floats, shape: str) -> Floats:
    """Logits of its teacher."""
    apart = np.random.default_rng(1).standard_normal(student.shape) * SHAPES[shape][1]
    return (student + apart).astype(np.float32).astype(np.float64)


def formula(student: Floats, teacher: Floats, objective: Objective) -> Floats:
    """The definition as `distillation` states it, a value for each position."""
    q, p = (np.exp(log_softmax(logits / objective.temperature)) for logits in (student, teacher))

    def kl(a: Floats, b: Floats) -> Floats:
        return np.where(a > 0, a * (np.log(np.where(a > 0, a, 1)) - np.log(np.where(a > 0, b, 1))), 0).sum(axis=-1)

    if objective.divergence == "forward-kl":
        return kl(p, q)
    if objective.divergence == "reverse-kl":
        return kl(q, p)
    m = objective.beta * p + (1 - objective.beta) * q
    return objective.beta * kl(p, m) + (1 - objective.beta) * kl(q, m)


#: What rounding the logarithms of two all but even distributions leaves of a position's divergence, in nats.
ROUNDING = 5e-7


@each_shape
@each_objective
def test_the_definition_is_trls(objective: Objective, shape: str) -> None:
    ours = drawn(shape)
    teacher = taught(ours, shape)
    expected = of_trl(torch.from_numpy(ours), teacher, objective, reduction="none").sum(-1).numpy()
    np.testing.assert_allclose(formula(ours, teacher, objective), expected, rtol=1e-9, atol=1e-13)


@each_shape
@each_objective
def test_value_and_gradient_on_torch_are_trls(objective: Objective, shape: str) -> None:
    ours = drawn(shape)
    teacher = taught(ours, shape)
    value, slope = value_and_slope(ours, teacher, objective)
    at = torch.tensor(ours, dtype=torch.float32, requires_grad=True)
    found = divergence_of_logits(at, buckets(teacher), objective)
    found.backward()
    assert at.grad is not None
    near(found.item(), at.grad.numpy(), value, slope, objective)


@each_shape
@each_objective
@pytest.mark.parametrize("way", ["fused", "plain", "eager"])
def test_value_and_gradient_on_mlx_are_trls(way: str, objective: Objective, shape: str) -> None:
    random = np.random.default_rng(2)
    hidden = mx.array(random.standard_normal((POSITIONS, WIDTH)).astype(np.float32))
    linear = nn.Linear(WIDTH, WORDS, bias=False)
    size = SHAPES[shape][0] / WIDTH**0.5
    linear.weight = mx.array((random.standard_normal((WORDS, WIDTH)) * size).astype(np.float32))
    head, weight = Head(linear), np.array(linear.weight).astype(np.float64)
    # As they are in float32: what rounding does to the logits themselves is none of the divergence's.
    logits = np.array(head.logits(hidden)).astype(np.float64)
    teacher = taught(logits, shape)
    given = buckets(teacher)
    arrays = mx.array(given.ids), mx.array(given.log_probs)
    targets = mx.zeros((POSITIONS,), mx.int32)
    value, slope = value_and_slope(logits, teacher, objective)
    if way == "eager":
        _, found, _, gradient = eager_distill(head, hidden, targets, given, objective, with_gradient=True, chunk=7)
        assert gradient is not None
        near(found, np.array(gradient), value, slope @ weight, objective)
        told = evaluate_distill(head, hidden, targets, arrays, objective, chunk=7)[1].item()
        near(told, np.array(gradient), value, slope @ weight, objective)
        return

    def fused(h: mx.array) -> mx.array:
        return fused_distill(head, h, targets, arrays, objective, chunk=7)[0]

    def plain(whole: mx.array) -> mx.array:
        return plain_distill(whole, targets, arrays, objective)[0]

    if way == "fused":
        loss, gradient = mx.value_and_grad(fused)(hidden)
        near(loss.item(), np.array(gradient), value, slope @ weight, objective)
    else:
        loss, gradient = mx.value_and_grad(plain)(mx.array(logits.astype(np.float32)))
        near(loss.item(), np.array(gradient), value, slope, objective)


def near(value: float, slope: NDArray[Any], expected: float, expected_slope: Floats, objective: Objective) -> None:
    """Equal but for what float32 leaves of it."""
    assert value == pytest.approx(expected, rel=1e-5, abs=ROUNDING * POSITIONS)
    # Near an end of beta the gradient is by that much less than the logarithms that it is a difference of.
    left = 1.0 if objective.divergence != "jsd" else min(objective.beta, 1 - objective.beta)
    assert np.abs(slope - expected_slope).max() <= 1e-5 / left * np.abs(expected_slope).max()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_near_its_ends_jsd_by_the_lesser_weight_is_what_trl_gives_at_them(temperature: float) -> None:
    ours = drawn("even")
    teacher = taught(ours, "even")
    for beta, end in ((1e-6, "forward-kl"), (1 - 1e-6, "reverse-kl")):
        small = formula(ours, teacher, Objective("jsd", 1.0, temperature, beta)) / min(beta, 1 - beta)
        at = Objective(end, 1.0, temperature)  # type: ignore[arg-type]
        limit = of_trl(torch.from_numpy(ours), teacher, at, reduction="none").sum(-1).numpy()
        np.testing.assert_allclose(small, limit, rtol=1e-5)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student and a teacher."""
    folder = tmp_path_factory.mktemp("trl")
    return make_tiny_model(folder / "student", seed=1), make_tiny_model(folder / "teacher", seed=2)


@pytest.mark.parametrize(
    "objective",
    [Objective("forward-kl"), Objective("reverse-kl", 1.0, 2.0), Objective("jsd", 1.0, 1.5, 0.2)],
    ids=name_of,
)
@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_students_mean_over_a_padded_batch_is_trls_of_transformers_logits(
    backend: str, objective: Objective, models: tuple[Path, Path]
) -> None:
    """From tokens to the mean a token: positions, shift, padding and mask."""
    learner, teacher = models
    batch = make_batch(random_rows((5, 40, 23, 11), seed=4, share=0.6), range(4))
    logits_of_teacher = whole_logits(teacher, batch)
    places = np.nonzero(batch.loss_mask)
    said = buckets(logits_of_teacher[places[0], places[1] - 1])
    changes: dict[str, Any] = {
        "distill": objective.divergence,
        "distill_temperature": objective.temperature,
        "distill_beta": objective.beta,
        "teacher_online": str(teacher),
    }
    one: Any = make_student(backend)(learner, **changes)
    stats = NO_TOKENS + one.evaluate(Batch(batch.tokens, batch.loss_mask, batch.lengths, batch.rows, said))

    labels = np.where(batch.loss_mask, batch.tokens, -100)[:, 1:]
    expected = of_trl(
        torch.from_numpy(whole_logits(learner, batch)[:, :-1]),
        logits_of_teacher[:, :-1],
        objective,
        labels=torch.from_numpy(labels),
        reduction="batchmean",
    )
    assert stats.target_tokens == int((labels != -100).sum())
    assert stats.divergence == pytest.approx(expected.item(), rel=2e-5)


def make_student(backend: str) -> Callable[..., Any]:
    if backend == "mlx":
        return student

    def reference(model: Path, **changes: Any) -> TorchStudent:
        return TorchStudent(model, settings(Path("data"), model, Path("run"), backend="torch", device="cpu", **changes))

    return reference


def whole_logits(folder: Path, batch: Batch) -> Floats:
    """Of transformers' own model, (B, T, V)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: Floats = model(input_ids=torch.from_numpy(batch.tokens).long()).logits.numpy().astype(np.float64)
    return logits
