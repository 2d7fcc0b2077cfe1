"""Tiny random models with a real tokenizer, in Hugging Face's layout, made in milliseconds and without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

Architecture = Literal["qwen2", "llama"]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

#: Qwen's chat template without its tools: ChatML with a default system prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: What the tokenizer learns its merges from.
CORPUS = (
    "def add(first, second):\n    return first + second\n",
    "for item in items:\n    if item is not None:\n        print(item)\n",
    "class Node:\n    def __init__(self, value, left=None, right=None):\n        self.value = value\n",
    "Write a function that returns the largest number of a list. The answer is short.",
    "The user asks the assistant, and the assistant answers with code and a sentence.",
)


def make_tokenizer(vocabulary: int = 384) -> Tokenizer:
    """A byte-level BPE of Qwen's kind with ChatML's special tokens at its end.

    Args:
        vocabulary: Tokens in all; at least 259, the bytes and the special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    return tokenizer


def tiny_config(
    architecture: Architecture, tokenizer: Tokenizer, *, layers: int, hidden: int, tied: bool, padding: int = 0
) -> dict[str, Any]:
    """The `config.json` of a tiny model: four heads, two of keys and values."""
    return {
        "architectures": [{"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}[architecture]],
        "model_type": architecture,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "vocab_size": tokenizer.get_vocab_size() + padding,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }


def random_weights(config: Mapping[str, Any], *, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Weights under their Hugging Face names: matrices scaled by their fan-in, norms near 1, q/k/v biases for Qwen2."""
    random = np.random.default_rng(seed)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]

    def matrix(rows: int, columns: int) -> NDArray[np.float32]:
        return (random.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

    def norm() -> NDArray[np.float32]:
        return (1 + 0.1 * random.standard_normal(hidden)).astype(np.float32)

    weights = {"model.embed_tokens.weight": matrix(config["vocab_size"], hidden), "model.norm.weight": norm()}
    if not config["tie_word_embeddings"]:
        weights["lm_head.weight"] = matrix(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        weights[f"{at}.input_layernorm.weight"] = norm()
        weights[f"{at}.post_attention_layernorm.weight"] = norm()
        for name, rows in (("q_proj", hidden), ("k_proj", keys), ("v_proj", keys)):
            weights[f"{at}.self_attn.{name}.weight"] = matrix(rows, hidden)
            if config["model_type"] == "qwen2":
                weights[f"{at}.self_attn.{name}.bias"] = 0.1 * matrix(1, rows)[0]
        weights[f"{at}.self_attn.o_proj.weight"] = matrix(hidden, hidden)
        weights[f"{at}.mlp.gate_proj.weight"] = matrix(inner, hidden)
        weights[f"{at}.mlp.up_proj.weight"] = matrix(inner, hidden)
        weights[f"{at}.mlp.down_proj.weight"] = matrix(hidden, inner)
    return weights


def make_tiny_model(
    folder: Path,
    *,
    architecture: Architecture = "qwen2",
    layers: int = 4,
    hidden: int = 64,
    vocabulary: int = 384,
    padding: int = 0,
    tied: bool = True,
    chat_template: str | None = CHAT_TEMPLATE,
    seed: int = 0,
) -> Path:
    """Write a tiny random model that mlx-lm and transformers load.

    Args:
        folder: Made if need be.
        vocabulary: Tokens in all, at least 259.
        padding: Rows of the embedding that belong to no token.
        chat_template: None for a model that cannot chat.

    Returns:
        `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(vocabulary)
    config = tiny_config(architecture, tokenizer, layers=layers, hidden=hidden, tied=tied, padding=padding)
    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    if chat_template is not None:
        tokenizer_config["chat_template"] = chat_template
    save_file(random_weights(config, seed=seed), folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2), encoding="utf-8")
    return folder
