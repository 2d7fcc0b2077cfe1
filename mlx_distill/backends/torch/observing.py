"""What transformers' model, with or without PEFT's adapter, says to a probe. In float32, on the CPU.

A name that is missing, left over or of another shape is an error here: transformers and peft only warn of it, and go on
with what they made up.

Writes: FOLDER/{logits.npy,greedy.json}, where it is told to.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from mlx_distill.agreement import ObservationWriter, Probe, ProbeRow
from mlx_distill.errors import ModelError

#: Names that are shown of a list of them.
_SHOWN = 3


def observe_folder(folder: Path, adapter: Path | None, probe: Probe, out: Path) -> None:
    """Load a model and write what it says.

    Args:
        folder: A model in Hugging Face layout, not quantized.
        adapter: Folder that PEFT wrote, or could have.
        out: Made where it is not there.

    Raises:
        ModelError: The model or the adapter does not load as it is.
    """
    model = _load(folder)
    if adapter is not None:
        model = _with_adapter(model, adapter)
    model.eval()
    writer = ObservationWriter(out, probe)
    with torch.inference_mode():
        for row in probe.rows:
            writer.add_row(_logits(model, row).float().numpy())
        writer.finish([_answer(model, prompt, probe) for prompt in probe.prompts])


def _load(folder: Path) -> Any:
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: transformers could not load this model: {error}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found.get(what):
            raise ModelError(f"{folder}: transformers found {what.replace('_', ' ')}: {_some(found[what])}.")
    return model


def _with_adapter(model: Any, adapter: Path) -> Any:
    weights = adapter / "adapter_model.safetensors"
    if not weights.is_file():
        # peft would look for a pickle next.
        raise ModelError(f"{weights}: no such file.")
    try:
        with warnings.catch_warnings():
            # peft looks at what transformers has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            adapted = PeftModel.from_pretrained(model, str(adapter))
        with safe_open(str(weights), framework="pt") as file:
            held = set(file.keys())
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{adapter}: peft could not load this adapter: {error}") from error
    taken = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if held != taken:
        raise ModelError(f"{adapter}: peft has other parameters than the file: {_some(held ^ taken)}.")
    return adapted


def _some(names: Collection[Any]) -> str:
    shown = ", ".join(str(name) for name in sorted(names, key=str)[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _logits(model: Any, row: ProbeRow) -> torch.Tensor:
    """(positions of the row, V)."""
    positions = torch.tensor(row.positions)
    logits = model(input_ids=torch.tensor([row.tokens]), use_cache=False, logits_to_keep=positions).logits[0]
    # An architecture that keeps all does not know the wish.
    wanted: torch.Tensor = logits if len(logits) == len(positions) else logits[positions]
    return wanted


def _answer(model: Any, prompt: tuple[int, ...], probe: Probe) -> list[int]:
    """A greedy answer, without what a model's own settings for writing would make of it."""
    answer: list[int] = []
    tokens, cache = torch.tensor([prompt]), None
    while len(answer) < probe.greedy_tokens:
        said = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = int(said.logits[0, -1].argmax())
        if token in probe.end_tokens:
            break
        answer.append(token)
        tokens, cache = torch.tensor([[token]]), said.past_key_values
    return answer
