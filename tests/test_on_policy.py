"""A teacher asked while training, and answers that the student writes: what is learned, drawn, resumed and refused."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load

from mlx_distill.backends.mlx.drawing import Sampling
from mlx_distill.backends.mlx.student import MlxStudent
from mlx_distill.batches import TokenRow
from mlx_distill.config import LogitsConfig, TrainConfig
from mlx_distill.errors import ConfigError, ModelError
from mlx_distill.layout import RunFolder
from mlx_distill.logits import write_logits
from mlx_distill.models.folder import end_tokens
from mlx_distill.settings import parse_settings
from mlx_distill.training.own_answers import is_own, own_batches
from mlx_distill.training.run import train
from tests.tiny import CHAT_TEMPLATE, make_tiny_model
from tests.training.runs import AtStep, make_data, metrics, online, outcome, settings


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write into it."""
    return make_data(tmp_path_factory.mktemp("taught") / "data")


# Asked while training


def test_a_teacher_that_is_asked_says_what_it_wrote(
    tmp_path: Path, data: Path, tiny_model: Path, teacher: Path
) -> None:
    """But for the digits that float16 leaves out."""
    write_logits(LogitsConfig(data=data, teacher=str(teacher), out=tmp_path / "logits"))
    cached = {"teacher_online": None, "teacher_logits": tmp_path / "logits"}
    train(online(data, tiny_model, tmp_path / "asked", teacher, epochs=1))
    train(online(data, tiny_model, tmp_path / "read", teacher, epochs=1, **cached))
    for asked, read in zip(metrics(tmp_path / "asked"), metrics(tmp_path / "read"), strict=True):
        assert asked["divergence"] == pytest.approx(read["divergence"], rel=1e-3)
        assert asked["loss"] == pytest.approx(read["loss"], rel=1e-4)


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_a_copy_of_its_teacher_stays(tmp_path: Path, data: Path, tiny_model: Path, own: float) -> None:
    train(online(data, tiny_model, tmp_path / "run", tiny_model, epochs=1, on_policy=own, learning_rate=1e-7))
    rows = metrics(tmp_path / "run")
    assert all(abs(row["divergence"]) < 1e-7 for row in rows)
    assert all(row["grad_norm"] < 1e-5 for row in rows if row["kind"] == "step")


def test_another_tokenizer_is_refused(tmp_path: Path, data: Path, tiny_model: Path) -> None:
    other = make_tiny_model(tmp_path / "other", vocabulary=390)
    with pytest.raises(ModelError, match=r"their vocabularies differ: 6 only the teacher's .*, 3 under another id"):
        train(online(data, tiny_model, tmp_path / "run", other))
    assert not RunFolder(tmp_path / "run").record.exists()


def rewrite_template(folder: Path, template: str | None) -> None:
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, "chat_template": template}), encoding="utf-8")


def test_another_chat_template_is_refused_where_it_writes_the_rows_otherwise(
    tmp_path: Path, data: Path, tiny_model: Path, teacher: Path
) -> None:
    other = shutil.copytree(teacher, tmp_path / "other")
    rewrite_template(other, "{# says the same #}" + CHAT_TEMPLATE)
    train(online(data, tiny_model, tmp_path / "run", other, epochs=1))
    rewrite_template(other, "Well." + CHAT_TEMPLATE)
    with pytest.raises(ModelError, match="their chat templates write the rows of this data set otherwise"):
        train(online(data, tiny_model, tmp_path / "refused", other))
    rewrite_template(other, None)
    with pytest.raises(ModelError, match="has no chat template"):
        train(online(data, tiny_model, tmp_path / "refused", other))
    assert not RunFolder(tmp_path / "refused").record.exists()


def test_the_same_words_cut_otherwise_are_refused(tmp_path: Path, data: Path, tiny_model: Path, teacher: Path) -> None:
    """Without its merges a tokenizer has the same vocabulary, and cuts every text into bytes."""
    other = shutil.copytree(teacher, tmp_path / "other")
    path = other / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model"]["merges"] = []
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ModelError, match="their tokenizers cut the rows of this data set otherwise"):
        train(online(data, tiny_model, tmp_path / "run", other))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"on_policy": 0.5}, "on_policy needs teacher_online"),
        ({"distill": "jsd", "teacher_online": "mlx:x", "teacher_logits": "y"}, "distill needs a teacher"),
        ({"teacher_online": "mlx:x"}, "is of no use without distill"),
        ({"on_policy": 1.5, "distill": "jsd", "teacher_online": "mlx:x"}, "on_policy = 1.5"),
    ],
)
def test_settings_that_make_no_sense_are_refused(data: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_settings(TrainConfig, {"data": data, "run": "run", **changes}, where="usage")


def test_a_teacher_of_text_alone_is_refused(tmp_path: Path, data: Path, tiny_model: Path) -> None:
    config = online(data, tiny_model, tmp_path / "run", tiny_model)
    with pytest.raises(ConfigError, match="gives text alone"):
        train(config.model_copy(update={"teacher_online": "anthropic:claude-sonnet-4-6"}))


def test_the_reference_backend_writes_no_answers(tmp_path: Path, data: Path, tiny_model: Path) -> None:
    config = online(data, tiny_model, tmp_path / "run", tiny_model, on_policy=0.5, backend="torch", device="cpu")
    with pytest.raises(ConfigError, match="writes no answers"):
        train(config)


def test_an_answer_that_the_model_cannot_hold_is_refused(tmp_path: Path, data: Path, tiny_model: Path) -> None:
    config = online(data, tiny_model, tmp_path / "run", tiny_model, on_policy=0.5, on_policy_tokens=2040)
    with pytest.raises(ConfigError, match="more than the model's context of 2048"):
        train(config)
    assert not RunFolder(tmp_path / "run").record.exists()


def test_rows_without_a_prompt_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "no question, no answer"}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match="text without a prompt to answer"):
        train(online(tmp_path, tiny_model, tmp_path / "run", tiny_model, on_policy=0.5))


def test_a_window_that_only_own_answers_outgrow_is_kept(tmp_path: Path, data: Path) -> None:
    """Rows fit into it, and rows' prompts with the student's answers do not."""
    folder = make_tiny_model(tmp_path / "model", architecture="llama")
    description = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    description |= {"sliding_window": 260, "layer_types": ["sliding_attention", "full_attention"] * 2}
    (folder / "config.json").write_text(json.dumps(description), encoding="utf-8")
    within, beyond = (
        MlxStudent(folder, online(data, folder, tmp_path / "run", folder, on_policy=own, on_policy_tokens=12)).ways
        for own in (0.0, 0.5)
    )
    assert "frozen layers" in within
    assert "frozen layers" not in beyond


# What the student writes


def prompts(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [random.integers(10, 300, size).astype(np.int32) for size in random.integers(3, 30, count)]


def test_an_answer_is_drawn_from_the_models_own_probabilities(tmp_path: Path, data: Path, tiny_model: Path) -> None:
    """Token by token without a cache, with the same key."""
    student = MlxStudent(tiny_model, settings(data, tiny_model, tmp_path / "run"))
    model, _ = load(str(tiny_model))
    model.set_dtype(mx.float32)
    asked = prompts(3)
    found = student.write(asked, [11, 12, 13], max_tokens=8, temperature=0.7, words=384)
    for prompt, key, answer in zip(asked, (11, 12, 13), found, strict=True):
        draw, tokens, expected = Sampling(0.7, key).sampler(), prompt.tolist(), []
        while len(expected) < 8 and not (expected and expected[-1] in end_tokens(tiny_model)):
            logits = model(mx.array([tokens]))[:, -1]
            expected.append(int(draw(logits - mx.logsumexp(logits, axis=-1, keepdims=True)).item()))
            tokens.append(expected[-1])
        assert answer.tolist() == expected


def test_an_answer_does_not_depend_on_those_beside_it(tmp_path: Path, data: Path, tiny_model: Path) -> None:
    student = MlxStudent(tiny_model, settings(data, tiny_model, tmp_path / "run", dropout=0.3))
    asked = prompts(5)
    together = student.write(asked, range(5), max_tokens=12, temperature=1.0, words=384)
    for at in range(5):
        alone = student.write(asked[at : at + 1], [at], max_tokens=12, temperature=1.0, words=384)
        assert alone[0].tolist() == together[at].tolist()
    again = student.write(asked, range(5), max_tokens=12, temperature=1.0, words=384)
    assert [a.tolist() for a in again] == [t.tolist() for t in together]
    other = student.write(asked, range(50, 55), max_tokens=12, temperature=1.0, words=384)
    assert [a.tolist() for a in other] != [t.tolist() for t in together]


def test_there_is_loss_on_the_answer_alone(tmp_path: Path, data: Path, tiny_model: Path) -> None:
    config = online(data, tiny_model, tmp_path / "run", tiny_model, on_policy=1.0)
    student = MlxStudent(tiny_model, config)
    rows = []
    for prompt in prompts(6):
        mask = np.zeros(len(prompt) + 5, bool)
        mask[len(prompt) :] = True
        rows.append(TokenRow(np.concatenate([prompt, np.arange(5, dtype=np.int32) + 7]), mask))
    chosen = [4, 0, 3]
    batches = own_batches(student, rows, chosen, config, 2, 384, lambda count, width: 2, lambda count, width: count)
    assert [batch.rows.tolist() for batch in batches] == [[4, 0], [3]]
    for batch in batches:
        assert batch.own
        for at, row in enumerate(batch.rows):
            size = len(rows[row].tokens) - 5
            length = int(batch.lengths[at])
            assert batch.tokens[at, :size].tolist() == rows[row].tokens[:size].tolist()
            assert size < length <= size + config.on_policy_tokens
            assert np.flatnonzero(batch.loss_mask[at]).tolist() == list(range(size, length))
            assert not set(batch.tokens[at, size : length - 1].tolist()) & end_tokens(tiny_model)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_own_batches_is_what_was_asked_for(tmp_path: Path, data: Path, share: float) -> None:
    config = online(data, Path("model"), tmp_path / "run", Path("teacher"), on_policy=share)
    found = np.mean([is_own(config, step) for step in range(4000)])
    # Four standard deviations of a binomial share.
    assert abs(found - share) <= 4 * np.sqrt(share * (1 - share) / 4000)


# Learned from


def test_what_the_student_wrote_teaches_no_text(tmp_path: Path, data: Path, tiny_model: Path, teacher: Path) -> None:
    """Of its own answers the weight of the cross-entropy makes no difference."""
    for weight in (1.0, 0.3):
        config = online(data, tiny_model, tmp_path / str(weight), teacher, on_policy=1.0, distill_weight=weight)
        train(config.model_copy(update={"epochs": 1}))
    one, other = ([row for row in metrics(tmp_path / name) if row["kind"] == "step"] for name in ("1.0", "0.3"))
    assert all(row["on_policy"] for row in one)
    for a, b in zip(one, other, strict=True):
        assert (a["loss"], a["divergence"], a["grad_norm"]) == (b["loss"], b["divergence"], b["grad_norm"])


def test_steps_say_whose_answers_they_learned_from(tmp_path: Path, data: Path, tiny_model: Path, teacher: Path) -> None:
    config = online(data, tiny_model, tmp_path / "run", teacher, on_policy=0.5, epochs=3)
    train(config)
    steps = [row for row in metrics(tmp_path / "run") if row["kind"] == "step"]
    assert [row.get("on_policy", False) for row in steps] == [is_own(config, at) for at in range(len(steps))]
    assert {True, False} == {row.get("on_policy", False) for row in steps}
    for row in steps:
        assert ("writing_seconds" in row) == ("scoring_seconds" in row) == row.get("on_policy", False)


@pytest.mark.parametrize("own", [0.5, 1.0])
def test_an_epochs_loss_is_of_the_data_where_any_of_it_is(
    tmp_path: Path, data: Path, tiny_model: Path, teacher: Path, own: float
) -> None:
    train(online(data, tiny_model, tmp_path / "run", teacher, epochs=2, on_policy=own))
    rows = metrics(tmp_path / "run")
    steps = [row for row in rows if row["kind"] == "step"]
    epochs = [row for row in rows if row["kind"] == "train"]
    assert {row.get("on_policy", False) for row in steps} == ({True, False} if own < 1 else {True})
    assert len(epochs) == 2
    for row in epochs:
        taken = [step for step in steps if row["epoch"] - 1 < step["epoch"] <= row["epoch"]]
        of_data = [step for step in taken if not step.get("on_policy")]
        assert row.get("on_policy", False) is (not of_data)
        counted = of_data or taken
        tokens = sum(step["target_tokens"] for step in counted)
        assert row["target_tokens"] == tokens
        assert row["loss"] == pytest.approx(sum(s["loss"] * s["target_tokens"] for s in counted) / tokens, rel=1e-6)


def same_but_for_time(run: Path) -> Any:
    adapter, rows, record = outcome(run)
    for row in rows:
        row.pop("writing_seconds", None)
        row.pop("scoring_seconds", None)
    return adapter, rows, record


@pytest.mark.parametrize("at", [1, 2, 4, 6])
def test_an_interrupted_run_resumes_to_the_bit(
    tmp_path: Path, data: Path, tiny_model: Path, teacher: Path, at: int
) -> None:
    train(online(data, tiny_model, tmp_path / "whole", teacher, on_policy=0.5, dropout=0.1))
    config = online(data, tiny_model, tmp_path / "cut", teacher, on_policy=0.5, dropout=0.1)
    with pytest.raises(KeyboardInterrupt):
        train(config, AtStep(at, lambda: signal.raise_signal(signal.SIGINT)))
    train(config)
    assert same_but_for_time(tmp_path / "cut") == same_but_for_time(tmp_path / "whole")


def test_accumulated_answers_make_the_update_of_all(
    tmp_path: Path, data: Path, tiny_model: Path, teacher: Path
) -> None:
    for name, size in (("whole", None), ("parts", 1)):
        train(online(data, tiny_model, tmp_path / name, teacher, on_policy=1.0, epochs=1, micro_batch_size=size))
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert a["divergence"] == pytest.approx(b["divergence"], rel=1e-4)
        assert a["target_tokens"] == b["target_tokens"]


def test_a_student_comes_nearer_to_its_teacher_by_its_own_answers(
    tmp_path: Path, data: Path, tiny_model: Path, teacher: Path
) -> None:
    """On rows that nobody trained on, which it does not see."""
    record = train(
        online(data, tiny_model, tmp_path / "run", teacher, on_policy=1.0, epochs=12, layers="all", learning_rate=5e-3)
    )
    assert record.first_divergence is not None and record.divergence is not None
    assert record.divergence < 0.8 * record.first_divergence
