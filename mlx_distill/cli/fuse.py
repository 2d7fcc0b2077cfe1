"""`mlx-distill fuse`."""

from __future__ import annotations

from mlx_distill.cli.command import command as make_command
from mlx_distill.cli.console import Summary
from mlx_distill.config import FuseConfig
from mlx_distill.progress import Progress
from mlx_distill.run_records import FuseCheck

_SOURCES = {
    "test": "held-out rows of test.jsonl",
    "valid": "rows of valid.jsonl",
    "train": "rows of train.jsonl, as none were held out",
    "prompts": "prompts of our own, as the run's data is gone",
}


@make_command(
    FuseConfig,
    examples="""
    mlx-distill fuse adapters/mine
    mlx-distill fuse adapters/mine --out models/mine
    mlx-distill fuse adapters/mine --quantized-base requantize
    """,
    keeps="Nothing was changed; a half-made model was removed.",
)
def command(config: FuseConfig, progress: Progress) -> Summary:
    """Merge an adapter into its base model.

    The result is a whole model in Hugging Face layout, which mlx-lm loads, and transformers where it is not quantized.
    It is read again from the disk and must say what base and adapter say, or it is not kept. On a quantized base that
    can mean that the layers which the adapter changed are written dequantized; all others stay as they are.
    """
    from mlx_distill.fuse import figures, fuse, fused_folder

    record = fuse(config, progress)
    out = fused_folder(config)
    check = record.check
    assert check is not None
    return Summary(
        {"fused": str(out), **record.model_dump(exclude={"format", "run"})},
        [
            f"Fused {record.layers} layers of {record.base} ({record.bytes / 1e9:.2f} GB).",
            f"  model  {out}",
            f"  {_verdict(check)} ({check.rows} {_SOURCES[check.source]}):",
            f"  {figures(check)}.",
            f"  try it:  mlx_lm.generate --model {out} --prompt 'Write a binary search in Python.'",
        ],
    )


def _verdict(check: FuseCheck) -> str:
    """What became of the weights, and whether the model says the same."""
    ways = {
        "plain": "Fused, it says what base and adapter say",
        "requantized": "Quantized again, it says what base and adapter say",
        "dequantized": f"With the changed layers in {check.dtype}, it says what base and adapter say",
    }
    if not check.passed:
        return "Quantized again, it does not quite say what base and adapter say, as you chose"
    if check.refused is not None:
        return f"{ways[check.way]}; quantized again it would not, by {check.refused.kl:.2g} nats of KL"
    return ways[check.way]
