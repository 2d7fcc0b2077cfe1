"""What models are asked where one is to say the same as another: held-out rows of the run's own data.

Reads: data/NAME/{test,valid,train}.jsonl, or the starter answers.  Writes: nothing but the cache of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill import layout
from mlx_distill.agreement import Probe, ProbeRow
from mlx_distill.batches import TokenRow
from mlx_distill.dataset import tokenise_split
from mlx_distill.errors import MlxDistillError
from mlx_distill.models.folder import end_tokens
from mlx_distill.models.tokenizer import load_tokenizer, require_chat_template
from mlx_distill.progress import SILENT, Progress
from mlx_distill.records import Split
from mlx_distill.run_records import ProbeSource

#: Rows read, positions whose logits are kept in all, and rows whose answer is written: with a vocabulary of 150,000
#: an observation takes 300 MB on disk.
MAX_ROWS = 16
MAX_POSITIONS = 512
MAX_PROMPTS = 4

#: Tokens of a row that are read; beyond, more tokens show nothing that these do not.
MAX_TOKENS = 1024

#: More than any row has.
_ANY_LENGTH = 2**31 - 1

#: Splits, the best to ask with first.
_PREFERRED: tuple[Split, ...] = ("test", "valid", "train")

#: Said to a model where no row of its data is left.
_PROMPTS = (
    "Write a Python function that returns the n-th Fibonacci number.",
    "What does the SQL keyword GROUP BY do? Give an example.",
    "Explain the difference between a list and a tuple.",
    "Write a shell command that counts the lines of all text files in a folder.",
)


def make_probe(
    model: Path,
    data: Path | None,
    *,
    greedy_tokens: int = 64,
    max_length: int | None = None,
    progress: Progress = SILENT,
) -> Probe:
    """Choose what is asked.

    Rows are of `test.jsonl`, or `valid.jsonl`, or `train.jsonl`: the first of these that has any. Where the folder is
    gone or cannot be read, prompts of our own stand in, and that is said.

    Args:
        model: Folder of the model, for its tokenizer.
        data: Folder of the data set that was trained on.
        greedy_tokens: Of an answer.
        max_length: Longer rows, in tokens, are passed over; None for none.

    Raises:
        ModelError: The tokenizer cannot be loaded, or has no chat template.
    """
    tokenizer: Any = load_tokenizer(model)
    require_chat_template(tokenizer, str(model))
    source, asked = _held_out(data, tokenizer, max_length, progress) or (
        "prompts",
        [_own(tokenizer, text) for text in _PROMPTS],
    )
    share = max(1, MAX_POSITIONS // len(asked))
    end = {tokenizer.eos_token_id, *end_tokens(model)}
    return Probe(
        rows=tuple(ProbeRow(tokens=row.tokens, positions=tuple(_spread(row.positions, share))) for row, _ in asked),
        prompts=tuple(prompt for _, prompt in asked[:MAX_PROMPTS]),
        greedy_tokens=greedy_tokens,
        end_tokens=tuple(sorted(token for token in end if token is not None)),
        source=source,
    )


#: A row, and the prompt that it answers.
_Asked = tuple[ProbeRow, tuple[int, ...]]


def _held_out(
    data: Path | None, tokenizer: Any, max_length: int | None, progress: Progress
) -> tuple[ProbeSource, list[_Asked]] | None:
    if data is None:
        return None
    for name in _PREFERRED:
        path = layout.DataFolder(data).split(name)
        try:
            if not path.is_file() or path.stat().st_size == 0:
                continue
            split = tokenise_split(path, tokenizer, max_length=max_length or _ANY_LENGTH)
        except (MlxDistillError, OSError) as error:
            reason = error.message if isinstance(error, MlxDistillError) else f"{path}: {error.strerror}."
            progress.say(f"{reason} Other rows are taken to look at the model.")
            continue
        # Some of the whole file, not its beginning: rows of one kind often stand together.
        which = _spread(range(len(split.rows)), MAX_ROWS)
        if found := [asked for at in which if (asked := _of_row(split.rows[at])) is not None]:
            return name, found
    progress.say(f"{data} has no rows any more; prompts of our own are taken to look at the model.")
    return None


def _of_row(row: TokenRow) -> _Asked | None:
    tokens = tuple(row.tokens[:MAX_TOKENS].tolist())
    positions = (np.flatnonzero(row.loss_mask[: len(tokens)]) - 1).tolist()
    if not positions:
        return None
    return ProbeRow(tokens=tokens, positions=tuple(positions)), tokens[: positions[0] + 1]


def _own(tokenizer: Any, text: str) -> _Asked:
    chat = [{"role": "user", "content": text}]
    written = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokens = tuple(tokenizer(written, add_special_tokens=False)["input_ids"])
    return ProbeRow(tokens=tokens, positions=tuple(range(len(tokens) - 1))), tokens


def _spread(positions: Sequence[int], count: int) -> list[int]:
    """At most `count` of them, from first to last."""
    if len(positions) <= count:
        return list(positions)
    return [positions[at] for at in np.linspace(0, len(positions) - 1, count).astype(int)]
