"""Writes the Modelfile with which Ollama takes a GGUF: the student's own template, its system prompt, its end marks.

Reads: MODEL/{config.json,generation_config.json,tokenizer*,LICENSE*} and the GGUF made of it.
Writes: OUT/Modelfile.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError

from mlx_distill import layout
from mlx_distill.errors import ConfigError
from mlx_distill.export.ollama_template import Chat, find_form
from mlx_distill.models.folder import context_length, end_tokens
from mlx_distill.models.gguf_reader import read_gguf
from mlx_distill.models.tokenizer import load_tokenizer, require_chat_template

#: Ollama keeps keys and values of so many tokens from the start; more is asked for with num_ctx when it is wanted.
MAX_CONTEXT = 8192

#: A licence that is longer is none.
_MAX_LICENCE = 1_000_000

_QUOTE = '"""'

#: By what a chat template asks for the date.
_DATE = "strftime_now"


def write_modelfile(model: Path, gguf: Path, out: Path, *, system: str | None = None) -> Path:
    """Write the Modelfile of a GGUF.

    Args:
        model: The folder that the GGUF was made of.
        gguf: The file; named in the Modelfile by its path from `out`.
        out: Folder of the Modelfile.
        system: What the system says where a conversation does not; by default what the chat template says then.

    Returns:
        The file.

    Raises:
        ModelError: The chat template is missing, or cannot be written for Ollama.
        ConfigError: A Modelfile cannot hold the system prompt.
        InputError: The GGUF cannot be read.
        ResourceError: It cannot be written.
    """
    tokenizer: Any = load_tokenizer(model)
    require_chat_template(tokenizer, str(model))
    adds_bos = read_gguf(gguf).get("tokenizer.ggml.add_bos_token", bool, False)

    def render(chat: Chat, *, asks: bool) -> str | None:
        try:
            return str(tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=asks))
        except TemplateError:
            return None

    form = find_form(render, str(model), bos=tokenizer.bos_token or "" if adds_bos else "")
    if system and "system" not in form.turns:
        raise ConfigError(f"The chat template of {model} does not let the system speak.", hint="Leave it out.")
    parts = [f"FROM {_from(gguf, out)}", f"TEMPLATE {_quoted(form.go_template(), f'The chat template of {model}')}"]
    if said := system or form.system:
        parts.append(f"SYSTEM {_quoted(said, 'The system prompt')}")
    parts += [f"PARAMETER stop {_quoted_mark(mark)}" for mark in _end_marks(model, tokenizer)]
    if length := context_length(model):
        parts.append(f"PARAMETER num_ctx {min(length, MAX_CONTEXT)}")
    parts += [f"LICENSE {_quoted(text, 'A licence')}" for text in _licences(model)]
    head = [f"# ollama create {gguf.stem} -f Modelfile"]
    if _DATE in str(tokenizer.chat_template):
        head.append("# The student's template writes the day's date; here it is the day on which this was written.")
    path = out / "Modelfile"
    layout.write_text(path, "\n".join([*head, *parts, ""]))
    return path


def _from(gguf: Path, out: Path) -> str:
    place = os.path.relpath(gguf.resolve(), out.resolve())
    name = place if place.startswith("..") else f"./{place}"
    if not _fits(name) or "\n" in name or name.strip() != name:
        raise ConfigError(f"A Modelfile cannot name the path {place!r}.", hint="Choose another folder.")
    return name


def _end_marks(model: Path, tokenizer: Any) -> list[str]:
    ends = {token for token in (tokenizer.eos_token_id, *end_tokens(model)) if token is not None}
    marks = [tokenizer.convert_ids_to_tokens(token) for token in sorted(ends)]
    return [mark for mark in marks if mark]


def _licences(model: Path) -> list[str]:
    texts = []
    for path in sorted(model.glob("LICENSE*")):
        if path.is_file() and path.stat().st_size <= _MAX_LICENCE:
            text = path.read_text(encoding="utf-8", errors="replace").strip()
            # Page breaks and their like mean nothing.
            texts.append("".join(character for character in text if _kept(character)).replace(_QUOTE, "'''"))
    return [text for text in texts if text]


def _kept(character: str) -> bool:
    """Whether Ollama keeps a character: what Go does not call printable it drops without a word."""
    return character.isprintable() or character in "\n\t"


def _fits(text: str) -> bool:
    # A value ends with the first line that ends in quotes; what follows would be read as commands.
    inner = text.split("\n")[:-1]
    return all(map(_kept, text)) and not any(line.rstrip().endswith(_QUOTE) for line in inner)


def _quoted(text: str, what: str) -> str:
    """A value of a Modelfile, which comes out as it is.

    Raises:
        ConfigError: A Modelfile cannot hold it.
    """
    if not _fits(text):
        odd = next((f"the character {one!r}" for one in text if not _kept(one)), f"a line that ends in {_QUOTE}")
        raise ConfigError(f"{what} holds {odd}, which a Modelfile cannot.", hint="Take it out, or export to gguf.")
    return f"{_QUOTE}{text}{_QUOTE}"


def _quoted_mark(mark: str) -> str:
    """As everyone writes it, where nothing in it asks for more."""
    quoted = _quoted(mark, "An end mark")
    return quoted if '"' in mark or "\n" in mark else f'"{mark}"'
