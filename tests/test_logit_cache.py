"""The format of a teacher's logits on disk."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from mlx_distill.batches import TeacherBuckets
from mlx_distill.logit_cache import MOST_NAMED, MOST_WORDS, LogitsRecord, entry_type, packed, unpacked


@pytest.mark.parametrize("words", [50, 2**16, 2**16 + 1, 151_936, MOST_WORDS])
@pytest.mark.parametrize("top_k", [1, 2, 50])
@pytest.mark.parametrize("rest", [True, False])
def test_entries_are_read_as_they_were_written(words: int, top_k: int, rest: bool) -> None:
    random = np.random.default_rng(words)
    ids = np.stack([np.sort(random.choice(words, top_k, replace=False)) for _ in range(40)]).astype(np.int32)
    edges = np.unique(
        np.clip([0, 2**16 - 1, 2**16, 2**17 - 1, 2**17, 3 * 2**16 - 1, 3 * 2**16, words - 1], 0, words - 1)
    )
    ids[0, : min(top_k, len(edges))] = edges[-top_k:]
    ids[0] = np.sort(ids[0])
    logs = np.log(random.dirichlet(np.ones(top_k + rest), 40)).astype(np.float16).astype(np.float32)
    entries = packed(TeacherBuckets(ids, logs))
    assert entries.dtype.itemsize == entry_type(top_k).itemsize == 4 * top_k + 8
    again = unpacked(np.frombuffer(entries.tobytes(), entries.dtype), rest=rest)
    np.testing.assert_array_equal(again.ids, ids)
    np.testing.assert_array_equal(again.log_probs, logs)
    assert again.has_rest == rest


@pytest.mark.parametrize("first", [0, 70_000, MOST_WORDS - MOST_NAMED])
def test_as_many_words_as_can_be_counted(first: int) -> None:
    """The most that may be named, all of which may lie on one side of a limit."""
    ids = np.arange(first, first + MOST_NAMED, dtype=np.int32)[None]
    logs = np.full((1, MOST_NAMED + 1), -11, np.float32)
    np.testing.assert_array_equal(unpacked(packed(TeacherBuckets(ids, logs)), rest=True).ids, ids)


def test_more_words_than_can_be_counted_are_refused() -> None:
    given = {"teacher": "t", "words": 151_936, "vocabulary_sha256": "a", "template_sha256": "b", "max_length": 9}
    given |= {"dtype": "float32", "splits": {}}
    assert LogitsRecord.model_validate({**given, "top_k": MOST_NAMED}).entry_bytes == 4 * MOST_NAMED + 8
    with pytest.raises(ValidationError, match="top_k"):
        LogitsRecord.model_validate({**given, "top_k": MOST_NAMED + 1})
