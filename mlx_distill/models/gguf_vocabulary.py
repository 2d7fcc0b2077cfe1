"""The vocabulary that a GGUF holds: its tokens, what each is, and which of them begin, end and pad."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from pathlib import Path

from mlx_distill.errors import ModelError
from mlx_distill.models.gguf_reader import GgufFile


class TokenType(IntEnum):
    """What a token is (`llama_token_type`)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id.

    Attributes:
        path: The file, for messages.
        kind: "gpt2" (byte-level BPE) or "llama" (SentencePiece), as the file calls it.
        pre: The file's name of the pre-tokenizer.
        tokens: By id.
        types: By id, of `TokenType`.
        scores: By id; empty where there are none.
        merges: Pairs of tokens, the first to be merged first; empty where there are none.
        special: Ids by role: "bos", "eos", "padding", "unknown", "eot". A role whose id lies outside the vocabulary
            is left out, as llama.cpp does.
        adds_bos: Whether a text is begun with the bos token.
        adds_space: Whether a text is begun with a space.
    """

    path: Path
    kind: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[tuple[str, str]]
    special: dict[str, int]
    adds_bos: bool
    adds_space: bool

    @cached_property
    def ids(self) -> dict[str, int]:
        """Ids of the tokens that a text can give. "Unused" ones only pad to the embedding's size."""
        return {token: at for at, token in enumerate(self.tokens) if self.types[at] != TokenType.UNUSED}

    def of_type(self, *kinds: TokenType) -> list[str]:
        """The tokens of these types, by id."""
        return [token for token, kind in zip(self.tokens, self.types, strict=True) if kind in kinds]

    def token(self, role: str) -> str | None:
        """The token of a role of `special`."""
        return self.tokens[self.special[role]] if role in self.special else None


def read_vocabulary(source: GgufFile) -> Vocabulary:
    """The vocabulary of a GGUF.

    Raises:
        ModelError: It is missing, or its parts do not fit each other or the embedding.
    """
    path = source.path
    kind = source.get("tokenizer.ggml.model", str)
    pre = source.get("tokenizer.ggml.pre", str, "default")
    tokens = source.get("tokenizer.ggml.tokens", list)
    types = source.get("tokenizer.ggml.token_type", list, [TokenType.NORMAL] * len(tokens))
    scores = source.get("tokenizer.ggml.scores", list, [])
    lines = source.get("tokenizer.ggml.merges", list, [])
    if not all(isinstance(text, str) for text in (*tokens, *lines)):
        raise ModelError(f"{path} has tokens or merges that are not text.")
    rows = source.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in source.tensors else len(tokens)
    if len(types) != len(tokens) or len(scores) not in (0, len(tokens)) or len(tokens) > rows:
        raise ModelError(
            f"{path} has {len(tokens)} tokens, {len(types)} types, {len(scores)} scores and {rows} embeddings."
        )
    special = {
        role: at
        for role in ("bos", "eos", "padding", "unknown", "eot")
        if (at := source.get(f"tokenizer.ggml.{role}_token_id", int, None)) is not None and 0 <= at < len(tokens)
    }
    found = Vocabulary(
        path=path,
        kind=kind,
        pre=pre,
        tokens=tokens,
        types=types,
        scores=scores,
        merges=[],
        special=special,
        # llama.cpp's own defaults, for files that do not say.
        adds_bos=source.get("tokenizer.ggml.add_bos_token", bool, kind == "llama" or pre == "llama-bpe"),
        adds_space=source.get("tokenizer.ggml.add_space_prefix", bool, kind == "llama"),
    )
    found.merges.extend(_pair(found, line) for line in lines)
    return found


def _pair(vocabulary: Vocabulary, line: str) -> tuple[str, str]:
    ids = vocabulary.ids
    left, _, right = line.partition(" ")
    if not (left in ids and right in ids and left + right in ids):
        raise ModelError(f"{vocabulary.path}: its merge '{line}' does not fit its tokens.", hint="Download it again.")
    return left, right
