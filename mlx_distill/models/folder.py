"""What a model's folder in Hugging Face layout must hold, and what its files tell.

Does not load the model: that the weights fit the architecture shows when a backend loads them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from mlx_distill.errors import ModelError

#: Weights as Python pickles: loading one runs whatever code it holds.
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

#: How many blocks of a weight file `fingerprint` looks at, and how large they are.
_SAMPLES = 64
_SAMPLE_BYTES = 4096

#: What a model's folder holds beside weights and configuration. Never code, never another format's weights.
_COMPANIONS = (
    "tokenizer*",
    "*.jinja",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "LICENSE*",
    "*.tiktoken",
)

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not a whole model.

    Raises:
        ModelError: Says what it lacks, and what to do.
    """
    config = read_config(folder)
    if not isinstance(config.get("model_type"), str):
        raise ModelError(f"{folder / 'config.json'} names no model_type.", hint="Download the model again.")
    _check_weights(folder)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            f"{folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)}).",
            hint="Copy the tokenizer files of the model it was made from into it.",
        )


def read_config(folder: Path) -> dict[str, Any]:
    """A model's `config.json`.

    Raises:
        ModelError: It is missing, or is not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder} is not a model's folder: it has no config.json.", hint=_instead(folder)) from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.", hint="Check its permissions.") from None
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}).", hint="Download the model again.") from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object.", hint="Download the model again.")
    return config


def context_length(folder: Path) -> int | None:
    """How many tokens a model was made to see at once, by its `config.json`; None where that does not say.

    Raises:
        ModelError: There is no readable `config.json`.
    """
    config = read_config(folder)
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        for key in _CONTEXT_KEYS:
            if isinstance(place.get(key), int) and place[key] > 0:
                return int(place[key])
    return None


def rotary_settings(folder: Path) -> dict[str, Any]:
    """What mlx-lm must be told beside `config.json` (`load_model(…, model_config=…)`) to turn positions rightly.

    transformers 5 writes a model's rotary settings as `rope_parameters`; mlx-lm's Llama and Qwen2 read `rope_theta`
    and `rope_scaling` alone, and take their defaults, without a word, where these are missing.

    Returns:
        The settings under mlx-lm's names; nothing where the file has them or does not say.

    Raises:
        ModelError: There is no readable `config.json`.
    """
    config = read_config(folder)
    stated = config.get("rope_parameters")
    if "rope_theta" in config or not isinstance(stated, dict) or "rope_theta" not in stated:
        return {}
    settings: dict[str, Any] = {"rope_theta": stated["rope_theta"]}
    if stated.get("rope_type", "default") != "default":
        settings["rope_scaling"] = {key: value for key, value in stated.items() if key != "rope_theta"}
    return settings


def companions(folder: Path) -> list[Path]:
    """What a copy of a model needs beside weights and configuration: tokenizer, template, licence."""
    return [file for pattern in _COMPANIONS for file in sorted(folder.glob(pattern))]


def end_tokens(folder: Path) -> set[int]:
    """The tokens that end an answer, as the model's own files name them; none where they do not.

    Raises:
        ModelError: `config.json` is missing, or is not a JSON object.
    """
    named = [read_config(folder).get("eos_token_id")]
    # Optional, and of no use where it is broken.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        named.append(json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"])
    tokens = [token for one in named for token in (one if isinstance(one, list) else [one])]
    return {token for token in tokens if isinstance(token, int)}


def licence(folder: Path) -> str | None:
    """The licence that the front matter of a model's README states, such as "apache-2.0"."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    front = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    if front is None:
        return None
    stated = {
        key: match[1].strip().strip("\"'")
        for key in ("license", "license_name")
        if (match := re.search(rf"^{key}:[ \t]*(\S.*)$", front[1], re.MULTILINE))
    }
    if stated.get("license") == "other":
        return stated.get("license_name", "other")
    return stated.get("license")


def _check_weights(folder: Path) -> None:
    # mlx-lm loads `model*.safetensors` and nothing else.
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"{folder} holds its weights only as pickles ({', '.join(pickles[:3])}), which can run any code.",
                hint="Use a copy of the model in safetensors.",
            )
        raise ModelError(f"{folder} holds no weights (model*.safetensors).", hint=_instead(folder))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError):
            raise ModelError(f"{index} is not an index of weights.", hint="Download the model again.") from None
        if missing := sorted(shards - {file.name for file in files}):
            raise ModelError(
                f"{folder} lacks {len(missing)} of {len(shards)} files of weights, such as {missing[0]}.",
                hint="Download the model again; what is there is kept.",
            )
    for file in files:
        _check_whole(file)


def _check_whole(path: Path) -> None:
    """A safetensors file states its size in its head: one cut short is found without reading the weights."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise ValueError("its head is cut")
            head = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in head.items() if name != "__metadata__"]
        if 8 + length + max(ends, default=0) != path.stat().st_size:
            raise ValueError("its size is not what its head says")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ModelError(
            f"{path} is not a whole safetensors file ({error}).", hint="Download or copy it again."
        ) from None


def _instead(folder: Path) -> str:
    """A hint for a folder that is something else than a model."""
    if (folder / "adapter_config.json").is_file():
        return f"It is a training run. Merge it with its base:  mlx-distill fuse {folder}"
    if found := sorted(folder.glob("*.gguf")):
        return f"Name the file instead:  {found[0]}"
    if inner := sorted(path.parent for path in folder.glob("*/config.json")):
        return f"Did you mean {inner[0]}?"
    return "A model's folder has config.json, model*.safetensors and a tokenizer."


def fingerprint(folder: Path) -> str:
    """Tells two models apart without reading all of their weights.

    A hash of `config.json`, of each weight file's name and size, and of blocks spread evenly over it, so that a
    fine-tuned model of the same shape differs. A change of a few single weights between the blocks would be missed.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for at in range(_SAMPLES):
                file.seek(size * at // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
