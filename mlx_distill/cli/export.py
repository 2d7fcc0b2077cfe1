"""`mlx-distill export`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import ExportConfig
from mlx_distill.progress import Progress

if TYPE_CHECKING:
    from mlx_distill.export.records import ExportRecord

_PROMPT = "Write a binary search in Python."


@make_command(
    ExportConfig,
    examples="""
    mlx-distill export adapters/mine --to peft
    mlx-distill export adapters/mine --to mlx --quantize 4
    mlx-distill export adapters/mine --to ollama --gguf-type q8_0
    mlx-distill export adapters/mine/fused --to hf --out models/mine
    """,
    keeps="Nothing was changed; a half-made export was removed.",
)
def command(config: ExportConfig, progress: Progress) -> Summary:
    """Write an adapter or a fused model in another tool's format.

    peft is the adapter alone, for transformers and vLLM. The others are the whole model, fused before: hf for
    transformers, mlx for mlx-lm, gguf for llama.cpp, ollama the same with a Modelfile. Each is loaded by what it is
    for and asked what the student is asked; where it says something else, nothing is written.
    """
    from mlx_distill.export.run import export, export_folder

    record = export(config, progress)
    out = export_folder(config)
    return Summary(
        {"exported": str(out), **record.model_dump(exclude={"format"})},
        [
            f"Exported {config.source} as {record.kind}, {record.weights} ({_size(record.bytes)}).",
            f"  folder  {out}",
            f"  check   {_agreement(record)}",
            *(f"  note    {note}" for note in record.notes),
            f"  try it:  {_trial(record, out)}",
        ],
    )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 10**9 else f"{count / 1e6:.1f} MB"


def _agreement(record: ExportRecord) -> str:
    found = record.agreement
    if found is None:
        return f"not loaded by anything: {record.unverified}"
    greedy = "" if found.greedy_agreement is None else f", greedy answers the same for {found.greedy_agreement:.0%}"
    price = ""
    if record.limit is None:
        price = f"; a loss of {found.loss:.4f} nats where the student has {found.loss_reference:.4f}"
    return (
        f"{record.consumer} says what the student says: the same next token at {found.same_choice:.1%} of "
        f"{found.positions} positions{greedy}; logits differ by {found.largest_difference:.2g} at most, "
        f"{found.kl:.1g} nats{price}"
    )


def _trial(record: ExportRecord, out: Path) -> str:
    folder = shlex.quote(str(out))
    if record.kind == "mlx":
        return f"mlx_lm.generate --model {folder} --prompt '{_PROMPT}'"
    if record.kind == "gguf":
        file = next(name for name in record.files if name.endswith(".gguf"))
        return f"llama-cli -m {shlex.quote(str(out / file))} -p '{_PROMPT}'"
    if record.kind == "ollama":
        name = shlex.quote(Path(record.source).absolute().name.lower())
        return f"ollama create {name} -f {shlex.quote(str(out / 'Modelfile'))} && ollama run {name}"
    if record.kind == "peft":
        program = f"from peft import AutoPeftModelForCausalLM as M; print(M.from_pretrained({str(out)!r}))"
    else:
        program = f"from transformers import pipeline; print(pipeline('text-generation', {str(out)!r})({_PROMPT!r}))"
    return f"python -c {shlex.quote(program)}"
