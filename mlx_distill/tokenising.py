"""Rows become tokens with a loss mask, on all cores.

A tokenizer of Hugging Face's runs a batch of texts on a pool of threads of its own, outside of Python's lock. So rows
are tokenised by the batch, and while one batch is under way the next is read and rendered: nine tenths of the work
run in parallel, and no process has to be started, fed, or cleaned up after. What comes out is what one row at a time
gives, in the order of the file.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_distill.batches import TokenRow
from mlx_distill.errors import InputError, ModelError
from mlx_distill.records import content_hash
from mlx_distill.rows import TODAY, RenderedRow, Row, render_row

#: Characters a batch. The tokenizer takes some 40 bytes for each while it works; two batches are under way at once.
BATCH_CHARACTERS = 1 << 18

#: Whose next version may write a chat, or cut a text, in another way.
_LIBRARIES = ("tokenizers", "transformers", "jinja2")

#: A tokenised row, and the line it came from.
LineTokens = tuple[int, TokenRow]


def tokenise_rows(
    rows: Iterable[Row], tokenizer: Any, path: Path, *, batch_characters: int = BATCH_CHARACTERS
) -> Generator[LineTokens, None, None]:
    """Tokenise rows, in their order.

    A chat carries loss on every assistant turn and on nothing else; a completion on the completion; a text on all of
    it, and on the end that is put to it. The first token never does: nothing predicts it.

    Args:
        tokenizer: A fast transformers tokenizer with a chat template.
        path: Of the file, for errors.

    Yields:
        A row's line, and its tokens.

    Raises:
        InputError: A row cannot be used; the first such row of the file is named, whatever else is under way.
    """
    failure: InputError | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="tokenise") as pool:
        pending: Future[list[LineTokens]] | None = None
        for batch in _batches(rows, tokenizer, path, batch_characters):
            if isinstance(batch, InputError):
                failure = batch
                break
            following = pool.submit(_encode, batch, tokenizer, path)
            if pending is not None:
                yield from pending.result()
            pending = following
        if pending is not None:
            yield from pending.result()
    if failure is not None:
        raise failure


def _batches(
    rows: Iterable[Row], tokenizer: Any, path: Path, size: int
) -> Iterator[Sequence[RenderedRow] | InputError]:
    """Rendered rows by the batch; then the error that ended them, once all before it has been handed over."""
    batch: list[RenderedRow] = []
    room = size
    failure: InputError | None = None
    try:
        for row in rows:
            rendered = render_row(row, tokenizer, path)
            batch.append(rendered)
            room -= len(rendered.text)
            if room <= 0:
                yield batch
                batch, room = [], size
    except InputError as error:
        failure = error
    if batch:
        yield batch
    if failure is not None:
        yield failure


def _encode(batch: Sequence[RenderedRow], tokenizer: Any, path: Path) -> list[LineTokens]:
    chats = [row for row in batch if row.spans is not None]
    texts = [row for row in batch if row.spans is None]
    try:
        # A rendered chat has its special tokens written out; a text is given those that open one.
        done = {**_encode_alike(chats, tokenizer, special=False), **_encode_alike(texts, tokenizer, special=True)}
    except (TypeError, ValueError) as error:
        if len(batch) > 1:
            return [tokens for row in batch for tokens in _encode([row], tokenizer, path)]
        raise InputError(f"cannot be tokenised: {error}", path=path, line=batch[0].line) from None
    return [(row.line, done[row.line]) for row in batch]


def _encode_alike(rows: Sequence[RenderedRow], tokenizer: Any, *, special: bool) -> dict[int, TokenRow]:
    if not rows:
        return {}
    encoded = tokenizer(
        [row.text for row in rows],
        add_special_tokens=special,
        return_attention_mask=False,
        return_token_type_ids=False,
    )
    made = {}
    for row, tokens, encoding in zip(rows, encoded["input_ids"], encoded.encodings, strict=True):
        if row.spans is None:
            if not tokens or tokens[-1] != tokenizer.eos_token_id:
                tokens.append(tokenizer.eos_token_id)
            mask = np.ones(len(tokens), dtype=np.bool_)
        else:
            mask = _loss_mask(encoding, row)
        mask[:1] = False
        made[row.line] = TokenRow(np.array(tokens, dtype=np.int32), mask)
    return made


def _loss_mask(encoding: Any, row: RenderedRow) -> NDArray[np.bool_]:
    """True for every token that starts within a span."""
    mask = np.zeros(len(encoding), dtype=np.bool_)
    for begin, end in row.spans or ():
        mask[_first_from(encoding, begin, row.text) : _first_from(encoding, end, row.text)] = True
    return mask


def _first_from(encoding: Any, place: int, text: str) -> int:
    """The first token that starts at this character of the text or after it; the count of tokens if none does."""
    if place >= len(text):
        return len(encoding)
    token = encoding.char_to_token(place)
    if token is None:
        # The tokenizer passes over this character. A list of all offsets takes as long as tokenising, so only here.
        return bisect_left([start for start, _ in encoding.offsets], place)
    # It holds the character, and may start before it.
    while token < len(encoding) and encoding.token_to_chars(token)[0] < place:
        token += 1
    return int(token)


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of all that decides which tokens a chat or text becomes: vocabulary, rules, template, date, libraries.

    Args:
        tokenizer: Of transformers.

    Raises:
        ModelError: It is none of the fast ones, so that it cannot tell where in a text a token stands.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"The tokenizer of {tokenizer.name_or_path} has no tokenizer.json, which training needs.",
            hint="Use a copy of the model that has one.",
        )
    backend = tokenizer.backend_tokenizer
    # Every call sets these anew; until the first, they are as the file has them.
    backend.no_truncation()
    backend.no_padding()
    return content_hash(
        {
            "tokenizer": hashlib.sha256(backend.to_str().encode()).hexdigest(),
            "chat_template": tokenizer.chat_template,
            "today": TODAY.isoformat(),
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "eos": tokenizer.eos_token_id,
            "split_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
            "libraries": {name: version(name) for name in _LIBRARIES},
        }
    )


def token_count(tokenizer: Any) -> int:
    """One more than the highest token that a tokenizer knows."""
    return 1 + max(int(token) for token in tokenizer.get_vocab().values())
