"""A tokenizer as a GGUF's vocabulary: tokens, types, merges, special tokens, chat template.

How text is split before tokens are looked up is kept in a GGUF as a name alone, under which llama.cpp knows what to do.
The name is chosen by comparing the tokenizer's own steps with those of each known name
(`mlx_distill.models.gguf_tokenizer`); where none is the same, it is refused: a near miss would split text in ways the
model was never trained on. So is a vocabulary that, read back, gives other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.errors import ModelError
from mlx_distill.models.folder import end_tokens
from mlx_distill.models.gguf_tokenizer import PRE_TOKENIZERS, build_tokenizer
from mlx_distill.models.gguf_vocabulary import TokenType, Vocabulary
from mlx_distill.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFWriter

_OTHER_WAY = "Export it with --to hf or mlx instead."

#: Characters of a text and of its tokens that a message shows.
_SHOWN = 200

#: Text on which tokenizers that differ tend to differ: spaces, digits, cases, scripts, contractions, code.
SAMPLES = (
    "Hello, world! It's what they'd've said — WE'LL see.",
    "  two spaces,\ttabs\t\tand   more  \n\n\n  lines \r\n of Windows  ",
    "1 22 333 4444 55555 3.14159 0x1F 1e-9 ½ ²³ ٣٤٥ 二〇二六",
    "def add(a, b):\n    return a + b  # sum\n\n\nclass Ünïcode:\n\tpass\n",
    "Größe, naïve café, Ελληνικά, русский, العربية, हिन्दी, ไทย, 日本語, 한국어, 👩‍👩‍👧‍👦🏽!",
    "camelCase snake_case SCREAMING_CASE http://a.b/c?d=e&f=%20g <b>'s</b> {{x}} $$ \\n",
    "\u00a0no-break\u2003em\u200bzero width\ufeff\x00\x07 control",
    "<|endoftext|><|im_start|> user<|im_end|>\n<|eot_id|> x",
    "a",
    " ",
    "",
)


@dataclass(frozen=True)
class StudentVocabulary:
    """What a GGUF holds of a tokenizer.

    Attributes:
        vocabulary: As it would be read back.
        adds_eos: Whether a text is ended with the eos token.
        further_ends: Tokens beside eos that end an answer.
        chat_template: In Jinja; None where it has none.
    """

    vocabulary: Vocabulary
    adds_eos: bool
    further_ends: tuple[int, ...]
    chat_template: str | None


def read_student_vocabulary(model: Path, config: Mapping[str, Any], rows: int) -> StudentVocabulary:
    """Take a tokenizer apart, and see that what was made of it gives the same tokens.

    Args:
        config: The model's `config.json`.
        rows: Of its embedding; beyond the tokenizer's tokens they are filled with unused ones.

    Raises:
        ModelError: It is of a kind that llama.cpp does not have, or that is not known here.
    """
    tokenizer: Any = load_tokenizer(model)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"The tokenizer of {model} has no tokenizer.json.", hint=_OTHER_WAY)
    whole = json.loads(backend.to_str())
    _require_byte_level(model, whole)
    tokens, types = _tokens(model, whole, rows)
    adds_bos, adds_eos = _added(model, tokenizer)
    ends = end_tokens(model)
    special = _special(tokenizer, config, ends, rows)
    vocabulary = Vocabulary(
        path=model,
        kind="gpt2",
        pre=pre_tokenizer_name(model, whole),
        tokens=tokens,
        types=types,
        scores=[],
        merges=[_pair(model, merge) for merge in whole["model"]["merges"]],
        special=special,
        adds_bos=adds_bos,
        adds_space=False,
    )
    added = [token["content"] for token in whole["added_tokens"]]
    _require_same_tokens(vocabulary, tokenizer, added, adds_eos=adds_eos)
    further = tuple(sorted(ends - {special.get("eos")}))
    return StudentVocabulary(vocabulary, adds_eos, further, chat_template(tokenizer))


def chat_template(tokenizer: Any) -> str | None:
    """The chat template that a tokenizer uses when none is named."""
    stated = tokenizer.chat_template
    if isinstance(stated, Mapping):
        stated = stated.get("default")
    return stated or None


def add_vocabulary(writer: GGUFWriter, student: StudentVocabulary) -> None:
    """Write a vocabulary into a GGUF's metadata."""
    vocabulary = student.vocabulary
    writer.add_tokenizer_model(vocabulary.kind)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([int(kind) for kind in vocabulary.types])
    writer.add_token_merges([" ".join(pair) for pair in vocabulary.merges])
    roles = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "padding": writer.add_pad_token_id,
        "unknown": writer.add_unk_token_id,
    }
    for role, at in vocabulary.special.items():
        roles[role](at)
    # "End of turn" and "end of message": the two places that a GGUF has for further ends.
    for add, at in zip((writer.add_eot_token_id, writer.add_eom_token_id), student.further_ends, strict=False):
        add(at)
    writer.add_add_bos_token(vocabulary.adds_bos)
    writer.add_add_eos_token(student.adds_eos)
    if student.chat_template:
        writer.add_chat_template(student.chat_template)


def pre_tokenizer_name(model: Path, whole: Mapping[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer splits text.

    Args:
        model: For the message.
        whole: A `tokenizer.json`.

    Raises:
        ModelError: No name is known for it.
    """
    mine = _splitting(whole)
    for name in PRE_TOKENIZERS:
        if _splitting(json.loads(build_tokenizer(_empty(model, name)).to_str())) == mine:
            return name
    raise ModelError(
        f"The tokenizer of {model} splits text in a way for which no name in a GGUF is known here; "
        f"known are {', '.join(PRE_TOKENIZERS)}.",
        hint=_OTHER_WAY,
    )


def _empty(model: Path, pre: str) -> Vocabulary:
    return Vocabulary(model, "gpt2", pre, [], [], [], [], {}, adds_bos=False, adds_space=False)


def _splitting(whole: Mapping[str, Any]) -> tuple[Any, ...]:
    """All that says how a text becomes pieces, without what changes nothing."""
    return (
        _steps(whole.get("normalizer"), "normalizers"),
        _steps(whole.get("pre_tokenizer"), "pretokenizers"),
        bool(whole["model"].get("ignore_merges")),
    )


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        return [step for one in part[inner] for step in _steps(one, inner)]
    step = {key: value for key, value in part.items() if key != "trim_offsets"}
    if step["type"] == "ByteLevel":
        step.setdefault("use_regex", True)
    return [step]


def _require_byte_level(model: Path, whole: Mapping[str, Any]) -> None:
    kind = whole["model"]
    plain = kind.get("type") == "BPE" and not any(
        kind.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    if not plain:
        what = "BPE with byte fallback, as SentencePiece has it" if kind.get("byte_fallback") else kind.get("type")
        raise ModelError(
            f"The tokenizer of {model} is of the kind {what}; as GGUF, byte-level BPE can be written.", hint=_OTHER_WAY
        )


def _tokens(model: Path, whole: Mapping[str, Any], rows: int) -> tuple[list[str], list[int]]:
    """Tokens by id and their types."""
    found: dict[int, tuple[str, TokenType]] = {}
    for token, at in whole["model"]["vocab"].items():
        if at in found:
            raise ModelError(f"The tokenizer of {model} gives the id {at} to '{found[at][0]}' and to '{token}'.")
        found[at] = token, TokenType.NORMAL
    for added in whole["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        found[added["id"]] = added["content"], kind
    if max(found, default=0) >= rows:
        raise ModelError(
            f"The tokenizer of {model} has a token with the id {max(found)}, and its embedding {rows} rows.",
            hint="Tokenizer and weights are of different models.",
        )
    filled = [found.get(at, (f"[PAD{at}]", TokenType.UNUSED)) for at in range(rows)]
    return [token for token, _ in filled], [kind for _, kind in filled]


def _pair(model: Path, merge: str | Sequence[str]) -> tuple[str, str]:
    left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
    if " " in left + right or not (left and right):
        raise ModelError(f"The tokenizer of {model} has the merge {merge!r}, which is none of byte-level BPE.")
    return left, right


def _added(model: Path, tokenizer: Any) -> tuple[bool, bool]:
    """Whether bos and eos are put around a text; asked of the tokenizer itself, whatever its files say."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    around = tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            if around == [tokenizer.bos_token_id] * bos + plain + [tokenizer.eos_token_id] * eos:
                return bos, eos
    raise ModelError(
        f"The tokenizer of {model} makes {around} of a text of the tokens {plain}; a GGUF can say bos and eos alone.",
        hint=_OTHER_WAY,
    )


def _special(tokenizer: Any, config: Mapping[str, Any], ends: set[int], rows: int) -> dict[str, int]:
    """Ids by role; what the tokenizer does not say, the config may."""
    stated = {
        "bos": (tokenizer.bos_token_id, config.get("bos_token_id")),
        "eos": (tokenizer.eos_token_id, *sorted(ends)),
        "padding": (tokenizer.pad_token_id, config.get("pad_token_id")),
        "unknown": (tokenizer.unk_token_id,),
    }
    found = {role: next((at for at in ids if isinstance(at, int)), None) for role, ids in stated.items()}
    return {role: at for role, at in found.items() if at is not None and 0 <= at < rows}


def _require_same_tokens(vocabulary: Vocabulary, tokenizer: Any, added: list[str], *, adds_eos: bool) -> None:
    made = build_tokenizer(vocabulary)
    # An added token may take the spaces around it, or be none within a word.
    among = "".join(f"a {token} {token}b\n\n{token}\t" for token in added)
    for text in (*SAMPLES, among):
        wanted = tokenizer(text)["input_ids"]
        found = made.encode(text).ids + [vocabulary.special["eos"]] * adds_eos
        if found != wanted:
            raise ModelError(
                f"The tokenizer of {vocabulary.path} gives {_short(text)} other tokens than a GGUF of it would: "
                f"{_short(wanted)} and {_short(found)}.",
                hint=_OTHER_WAY,
            )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
