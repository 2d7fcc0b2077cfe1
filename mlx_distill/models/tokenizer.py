"""Loads a model's tokenizer, and holds it to having a chat template."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_distill.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model's folder. Nothing is downloaded, and no code of the folder is run.

    Raises:
        ModelError: Its files are missing or broken, or it needs code of its own.
    """
    _check_json(folder)
    from transformers import AutoTokenizer
    from transformers.utils import logging

    # Its warnings are for other uses: that torch is missing, that a text is longer than the model's context.
    logging.set_verbosity_error()
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises nothing narrower
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"The tokenizer of {folder} cannot be loaded: {reason}",
            hint="Copy the tokenizer files of the model it was made from into it, or download it again.",
        ) from error
    return tokenizer


def leave_out_torch() -> None:
    """Let this process have no torch, for what does not compute with it; before anything imports transformers.

    transformers imports it with its tokenizers where it is installed: 250 MB of memory and some seconds. Where it is
    there already, it stays: transformers decides once what it can do.
    """
    if "transformers" not in sys.modules and "torch" not in sys.modules:
        sys.modules["torch"] = None  # type: ignore[assignment]


def require_chat_template(tokenizer: Any, spec: str) -> None:
    """Refuse a tokenizer that cannot write a chat, as that of a base model.

    Args:
        tokenizer: Of transformers, or mlx-lm's wrapper of one.
        spec: The model, as the user named it.

    Raises:
        ModelError: It has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            f"{spec} has no chat template, so it does not know how a conversation is written.",
            hint="Use its instruction-tuned variant (often named -Instruct or -Chat), "
            "or put a chat_template.jinja into its folder.",
        )


def _check_json(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(
                f"{path} is not whole JSON ({error}).", hint="Download the model again, or copy the file again."
            ) from None
