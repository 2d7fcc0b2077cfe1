"""Models of one tokenizer whose vocabularies are padded to other sizes, as Qwen2.5's are: 151,936 and 152,064 columns.

Here the padding is what a model finds likeliest by far, so that whatever takes it for words is told.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load
from safetensors.numpy import load_file, save_file

from mlx_distill.backends.mlx.student import MlxStudent
from mlx_distill.backends.mlx.teaching import LogitTeacher
from mlx_distill.batches import make_batch
from mlx_distill.config import LogitsConfig
from mlx_distill.errors import InputError
from mlx_distill.layout import logits_record, read_record, write_text
from mlx_distill.logit_cache import LogitsRecord
from mlx_distill.logit_source import known_words
from mlx_distill.logits import write_logits
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.training.run import train
from tests.backends.students import random_rows
from tests.tiny import make_tiny_model
from tests.training.runs import make_data, metrics, online, settings

WORDS = 384


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do not write into it."""
    return make_data(tmp_path_factory.mktemp("padded") / "data")


def padded(folder: Path, padding: int, **options: Any) -> Path:
    make_tiny_model(folder, padding=padding, **options)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][WORDS:] *= 30
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 columns. Do not write into it."""
    return padded(tmp_path_factory.mktemp("narrow") / "model", 16)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """448 columns. Do not write into it."""
    return padded(tmp_path_factory.mktemp("wide") / "model", 64, seed=5, hidden=96)


@pytest.mark.parametrize("top_k", [20, WORDS])
def test_a_teacher_says_what_it_thinks_of_words_alone(wide: Path, top_k: int) -> None:
    known = known_words(load_tokenizer(wide), wide)
    assert known == WORDS
    teacher = LogitTeacher(wide, dtype="float32", known=known)
    assert teacher.words == WORDS
    row = random_rows((30,), seed=3, share=0.5)[0]
    said = teacher.likeliest(make_batch([row], [0]), top_k)
    model, _ = load(str(wide))
    places = np.flatnonzero(row.loss_mask)
    whole = np.array(model(mx.array(row.tokens[None]))[0]).astype(np.float64)[places - 1]
    assert (whole.argmax(axis=-1) >= WORDS).any()
    whole = whole[:, :WORDS] - np.log(np.exp(whole[:, :WORDS]).sum(axis=-1, keepdims=True))
    assert said.ids.max() < WORDS
    named = np.take_along_axis(whole, said.ids, axis=-1)
    np.testing.assert_allclose(said.log_probs[:, :top_k], named, atol=2e-5)
    np.testing.assert_allclose(np.exp(said.log_probs.astype(np.float64)).sum(axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("own", [0.0, 0.5])
@pytest.mark.parametrize("which", ["the teacher's is wider", "the student's is wider"])
def test_either_learns_from_the_other(
    tmp_path: Path, data: Path, narrow: Path, wide: Path, which: str, own: float
) -> None:
    student, teacher = (narrow, wide) if which == "the teacher's is wider" else (wide, narrow)
    train(online(data, student, tmp_path / "asked", teacher, on_policy=own, epochs=1))
    found = metrics(tmp_path / "asked")
    assert all(0 < row["divergence"] < 100 for row in found)
    if own:
        return
    write_logits(LogitsConfig(data=data, teacher=str(teacher), out=tmp_path / "logits"))
    cached = {"teacher_online": None, "teacher_logits": tmp_path / "logits"}
    train(online(data, student, tmp_path / "read", teacher, epochs=1, **cached))
    for asked, read in zip(found, metrics(tmp_path / "read"), strict=True):
        assert asked["divergence"] == pytest.approx(read["divergence"], rel=1e-3)


def test_the_student_writes_no_padding(tmp_path: Path, data: Path, narrow: Path) -> None:
    student = MlxStudent(narrow, settings(data, narrow, tmp_path / "run"))
    prompts = [np.arange(10, 30, dtype=np.int32)] * 3
    for words, all_known in ((WORDS, True), (WORDS + 16, False)):
        found = np.concatenate(student.write(prompts, range(3), max_tokens=20, temperature=1.0, words=words))
        assert bool((found < WORDS).all()) == all_known


def test_logits_that_name_padding_are_refused(tmp_path: Path, data: Path, narrow: Path, wide: Path) -> None:
    """As an earlier version wrote them."""
    write_logits(LogitsConfig(data=data, teacher=str(wide), out=tmp_path / "logits"))
    record = read_record(logits_record(tmp_path / "logits"), LogitsRecord)
    write_text(logits_record(tmp_path / "logits"), record.model_copy(update={"words": 448}).model_dump_json())
    cached = {"teacher_online": None, "teacher_logits": tmp_path / "logits"}
    with pytest.raises(InputError, match="tells 448 words apart and the student 384"):
        train(online(data, narrow, tmp_path / "run", wide, **cached))
