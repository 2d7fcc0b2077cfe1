"""A converted tokenizer gives the ids that the original gives, for any text."""

from __future__ import annotations

import contextlib
import io
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mlx_distill.errors import ModelError
from mlx_distill.models.gguf import convert_gguf
from mlx_distill.models.gguf_tokenizer import build_tokenizer
from mlx_distill.models.gguf_vocabulary import Vocabulary
from mlx_distill.models.tokenizer import load_tokenizer, require_chat_template
from tests.tiny import CORPUS, QWEN_SPLIT, SPECIAL, make_tiny_model
from tests.tiny_gguf import write_gguf

TEXTS = [
    "def add(first, second):\n\treturn first + second  # 12345 + 678\n",
    "for item in items:\n\n\n    if item is not None:   \n        print(f'{item!r:>10}')\n",
    "naïve café, 你好 世界, Ελληνικά, עברית, 🙂👩‍👩‍👧, e\u0301 \u00e9, \ufb01",
    "x\u00a0y \u2003 z\r\n\r\n  \t end   ",
    "1 22 333 4444 55555 ½ ² ٣",
    "it's we'll I'VE don't  'tis",
    "<|im_start|>user\nhi<|im_end|> <|im_start|> <|im_ start|>",
    "",
    " ",
    "\x00\x01\x7f",
]


def byte_level(split: Any, *, ignore_merges: bool = False) -> Tokenizer:
    """A small trained reference tokenizer, made without any of the converter's code."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, *TEXTS, "12 123 1234 " * 20] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return tokenizer


def split_by(expression: str) -> Any:
    split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def vocabulary_of(tokenizer: Tokenizer, pre: str, *, bos: str | None = None, adds_bos: bool = False) -> Vocabulary:
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=lambda token: ids[token])
    return Vocabulary(
        path=Path("tiny.gguf"),
        kind="gpt2",
        pre=pre,
        tokens=tokens,
        types=[3 if token in SPECIAL else 1 for token in tokens],
        scores=[],
        merges=[tuple(merge) for merge in json.loads(tokenizer.to_str())["model"]["merges"]],
        special={} if bos is None else {"bos": ids[bos]},
        adds_bos=adds_bos,
        adds_space=False,
    )


SMOLLM = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)

KINDS: dict[str, Callable[[], Tokenizer]] = {
    "smollm": lambda: byte_level(SMOLLM),
    "gpt-2": lambda: byte_level(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "llama-bpe": lambda: byte_level(
        split_by(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        ignore_merges=True,
    ),
}


@pytest.mark.parametrize("pre", KINDS)
def test_ids_and_text_equal_the_reference(pre: str) -> None:
    reference = KINDS[pre]()
    converted = build_tokenizer(vocabulary_of(reference, pre))
    for text in TEXTS:
        ids = reference.encode(text).ids
        assert converted.encode(text).ids == ids, text
        assert converted.decode(ids, skip_special_tokens=False) == text
        assert converted.decode(ids) == reference.decode(ids)


def test_the_kinds_differ() -> None:
    """Else the test above could not tell one pre-tokenizer from another."""
    seen = set()
    for pre in (*KINDS, "qwen2"):
        split = build_tokenizer(vocabulary_of(_QWEN, pre)).pre_tokenizer
        assert split is not None
        seen.add(tuple(piece for piece, _ in split.pre_tokenize_str("12345 (x) I'VE\n\n\n    y")))
    assert len(seen) == 4


_QWEN = byte_level(split_by(QWEN_SPLIT))
_CONVERTED_QWEN = build_tokenizer(vocabulary_of(_QWEN, "qwen2"))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_text_survives_qwen2(text: str) -> None:
    composed = unicodedata.normalize("NFC", text)
    ids = _CONVERTED_QWEN.encode(text).ids
    assert ids == _QWEN.encode(composed).ids
    assert _CONVERTED_QWEN.decode(ids, skip_special_tokens=False) == composed


def test_special_tokens_are_one_token_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DISTILL_CACHE", str(tmp_path / "cache"))
    original = make_tiny_model(tmp_path / "model", layers=1)
    folder = convert_gguf(write_gguf(original, tmp_path / "tiny.gguf"))
    ours, reference = load_tokenizer(folder), load_tokenizer(original)
    chat = [{"role": "user", "content": "Add 12 and 3 <|im_end|>."}, {"role": "assistant", "content": "15"}]
    assert ours.chat_template == reference.chat_template
    assert ours.apply_chat_template(chat, return_dict=False) == reference.apply_chat_template(chat, return_dict=False)
    for text in TEXTS:
        assert (
            ours.encode(text)
            == reference.encode(text)
            == Tokenizer.from_file(str(original / "tokenizer.json")).encode(text).ids
        )
    assert (ours.eos_token, ours.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert ours.decode(ours.encode("a<|im_end|>b"), skip_special_tokens=True) == "ab"


def test_user_defined_is_whole_but_not_special_and_unused_is_no_token() -> None:
    vocabulary = vocabulary_of(_QWEN, "qwen2")
    extra = ["<tool_call>", "[PAD400]"]
    vocabulary.tokens.extend(extra)
    vocabulary.types.extend([4, 5])
    tokenizer = build_tokenizer(vocabulary)
    ids = tokenizer.encode("a<tool_call>b").ids
    assert len(ids) == 3
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<tool_call>b"
    assert tokenizer.token_to_id("[PAD400]") is None
    assert len(tokenizer.encode("[PAD400]").ids) > 1


def test_bos_is_put_first_where_the_file_says_so() -> None:
    at = _QWEN.token_to_id("<|im_start|>")
    plain = build_tokenizer(vocabulary_of(_QWEN, "qwen2", bos="<|im_start|>"))
    begun = build_tokenizer(vocabulary_of(_QWEN, "qwen2", bos="<|im_start|>", adds_bos=True))
    ids = plain.encode("add").ids
    assert begun.encode("add").ids == [at, *ids]
    assert begun.encode("add", add_special_tokens=False).ids == ids


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert'"),
        ({"tokenizer.ggml.pre": "chatglm-bpe"}, "'chatglm-bpe'"),
        ({"tokenizer.ggml.merges": ["a zz"]}, "'a zz'"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "2 types"),
        ({"tokenizer.ggml.tokens": ["x"] * 500, "tokenizer.ggml.token_type": [1] * 500}, "500 tokens"),
    ],
)
def test_a_vocabulary_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("MLX_DISTILL_CACHE", str(tmp_path / "cache"))

    def extra(writer: gguf.GGUFWriter) -> None:
        for key, value in change.items():
            writer.kv_data[0].pop(key)
            writer.add_string(key, value) if isinstance(value, str) else writer.add_array(key, value)

    path = write_gguf(make_tiny_model(tmp_path / "model", layers=1), tmp_path / "tiny.gguf", extra=extra)
    with pytest.raises(ModelError, match=message):
        convert_gguf(path)


@pytest.fixture(scope="module")
def spm() -> sentencepiece.SentencePieceProcessor:
    """A real SentencePiece model of Llama 2's settings."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in (*CORPUS, *TEXTS[:2]) for line in text.split("\n")] * 10),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def spm_vocabulary(spm: sentencepiece.SentencePieceProcessor, *, adds_bos: bool) -> Vocabulary:
    count = spm.get_piece_size()
    kinds = [
        2 if spm.is_unknown(at) else 3 if spm.is_control(at) else 6 if spm.is_byte(at) else 1 for at in range(count)
    ]
    return Vocabulary(
        path=Path("tiny.gguf"),
        kind="llama",
        pre="default",
        tokens=[spm.id_to_piece(at) for at in range(count)],
        types=kinds,
        scores=[spm.get_score(at) for at in range(count)],
        merges=[],
        special={"bos": spm.bos_id(), "eos": spm.eos_id(), "unknown": spm.unk_id()},
        adds_bos=adds_bos,
        adds_space=True,
    )


def test_sentencepiece_gives_the_ids_of_sentencepiece(spm: sentencepiece.SentencePieceProcessor) -> None:
    tokenizer = build_tokenizer(spm_vocabulary(spm, adds_bos=True))
    for text in (text for text in TEXTS if "<|" not in text and "\x00" not in text and text):
        ids = spm.encode(text)
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
        assert tokenizer.encode(text).ids == [spm.bos_id(), *ids]
        assert tokenizer.decode(ids) == text


def test_sentencepiece_without_scores_is_refused(spm: sentencepiece.SentencePieceProcessor) -> None:
    vocabulary = spm_vocabulary(spm, adds_bos=False)
    vocabulary.scores.clear()
    with pytest.raises(ModelError, match="without scores"):
        build_tokenizer(vocabulary)


def test_a_folder_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "base", layers=1, chat_template=None)
    tokenizer = load_tokenizer(folder)
    with pytest.raises(ModelError, match=r"my/base has no chat template") as caught:
        require_chat_template(tokenizer, "my/base")
    assert "Instruct" in (caught.value.hint or "")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    require_chat_template(load_tokenizer(folder), "my/base")


@pytest.mark.parametrize("content", ['{"version": "1.0", ', '{"version": "1.0", "model": {"type": "Nope"}}', "[]"])
def test_a_broken_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    folder = make_tiny_model(tmp_path / "model", layers=1)
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(folder)


def test_code_in_a_folder_is_never_run(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path / "model", layers=1)
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config["tokenizer_class"] = "Evil"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with contextlib.suppress(ModelError):
        load_tokenizer(folder)
    assert not marker.exists()
