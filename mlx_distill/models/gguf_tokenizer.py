"""A GGUF's vocabulary as `tokenizer.json` and `tokenizer_config.json`.

Of how text is split before tokens are looked up, GGUF keeps only a name, under which llama.cpp knows what to do. The
names known here are in `PRE_TOKENIZERS`; another is refused, since a near miss would split text in ways the model was
never trained on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mlx_distill.errors import ModelError
from mlx_distill.models.gguf_reader import GgufFile
from mlx_distill.models.gguf_sentencepiece import sentencepiece_tokenizer
from mlx_distill.models.gguf_vocabulary import TokenType, Vocabulary, read_vocabulary

_QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_SPLIT = _QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


def _smollm(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _gpt2(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)


def _qwen2(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _split_by(_QWEN2_SPLIT)


def _llama3(tokenizer: Tokenizer) -> None:
    tokenizer.model.ignore_merges = True
    tokenizer.pre_tokenizer = _split_by(_LLAMA3_SPLIT)


def _split_by(expression: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(expression), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


#: llama.cpp's name of a pre-tokenizer → what sets it up.
PRE_TOKENIZERS: Mapping[str, Callable[[Tokenizer], None]] = {
    "smollm": _smollm,
    "qwen2": _qwen2,
    "llama-bpe": _llama3,
    "gpt-2": _gpt2,
}


def save_tokenizer(source: GgufFile, folder: Path) -> None:
    """Write the tokenizer's two files.

    Raises:
        ModelError: The vocabulary or its pre-tokenizer is of a kind that cannot be converted.
    """
    vocabulary = read_vocabulary(source)
    build_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    config = _tokenizer_config(vocabulary)
    config["model_max_length"] = source.hyper("context_length", int)
    if template := source.get("tokenizer.chat_template", str, ""):
        config["chat_template"] = template
    text = json.dumps(config, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer of a vocabulary.

    Raises:
        ModelError: See `save_tokenizer`.
    """
    if vocabulary.kind == "gpt2":
        tokenizer = _byte_level_tokenizer(vocabulary)
    elif vocabulary.kind == "llama":
        tokenizer = sentencepiece_tokenizer(vocabulary)
    else:
        raise ModelError(
            f"{vocabulary.path} has a vocabulary of the kind '{vocabulary.kind}'; gpt2 and llama can be read.",
            hint="Give the model's Hugging Face folder or its Hub id instead.",
        )
    tokenizer.post_processor = _post_processor(vocabulary)
    special = vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN)
    plain = vocabulary.of_type(TokenType.USER_DEFINED)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    return tokenizer


def _byte_level_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    if vocabulary.pre not in PRE_TOKENIZERS:
        raise ModelError(
            f"{vocabulary.path} has the pre-tokenizer '{vocabulary.pre}'; {', '.join(PRE_TOKENIZERS)} can be read.",
            hint="Give the model's Hugging Face folder or its Hub id instead.",
        )
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary.ids, merges=vocabulary.merges))
    PRE_TOKENIZERS[vocabulary.pre](tokenizer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _post_processor(vocabulary: Vocabulary) -> processors.PostProcessor:
    steps: list[processors.PostProcessor] = []
    if vocabulary.kind == "gpt2":
        steps.append(processors.ByteLevel(trim_offsets=False))
    if (bos := vocabulary.token("bos")) is not None and vocabulary.adds_bos:
        at = vocabulary.special["bos"]
        single, pair = [bos, "$A"], [bos, "$A", f"{bos}:1", "$B:1"]
        steps.append(processors.TemplateProcessing(single=single, pair=pair, special_tokens=[(bos, at)]))
    return steps[0] if len(steps) == 1 else processors.Sequence(steps)


def _tokenizer_config(vocabulary: Vocabulary) -> dict[str, Any]:
    roles = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    tokens = {f"{name}_token": vocabulary.token(role) for name, role in roles.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": vocabulary.adds_bos,
        **{key: token for key, token in tokens.items() if token is not None},
    }
