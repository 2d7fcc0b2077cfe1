"""A SentencePiece vocabulary of a GGUF (Llama 2, TinyLlama, Mistral) as a byte-falling-back BPE.

SentencePiece keeps a score for each token and no merges: of all neighbours whose union is a token, it merges those
whose union scores highest. As a list of merges that is every way to split a token into two, ordered by its score.
"""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers

from mlx_distill.errors import ModelError
from mlx_distill.models.gguf_vocabulary import TokenType, Vocabulary

_SPACE = "▁"


def sentencepiece_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer of a vocabulary of the kind "llama", without its added tokens and what begins a text.

    Raises:
        ModelError: It has no scores.
    """
    if not vocabulary.scores:
        raise ModelError(f"{vocabulary.path} has a SentencePiece vocabulary without scores.", hint="Download it again.")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary.ids,
            merges=merges_by_score(vocabulary),
            unk_token=vocabulary.token("unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.adds_space:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = spaces
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def merges_by_score(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """The merges that a vocabulary's scores amount to, the first to be made first."""
    # Only normal tokens come of merging: a control token spelled out in a text is no control token.
    usable = {t for at, t in enumerate(vocabulary.tokens) if vocabulary.types[at] == TokenType.NORMAL}
    scored = [
        (-vocabulary.scores[at], at, token[:cut], token[cut:])
        for token, at in vocabulary.ids.items()
        if token in usable
        for cut in range(1, len(token))
        if token[:cut] in usable and token[cut:] in usable
    ]
    return [(left, right) for _, _, left, right in sorted(scored)]
