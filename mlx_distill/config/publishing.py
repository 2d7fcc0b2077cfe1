"""What can be set of fusing, exporting and sharing."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from mlx_distill.settings import ARGUMENT, Settings


class FuseConfig(Settings):
    """Merge an adapter into its base model."""

    run: Path = Field(description="Folder of the training run.", json_schema_extra=ARGUMENT)
    out: Path | None = Field(None, description="Folder of the fused model.  [default: RUN/fused]")
    quantized_base: Literal["auto", "dequantize", "requantize"] = Field(
        "auto",
        description="Weights of a model fused from a quantized base: quantized again as they were where that says the "
        "same as the adapter, else dequantized; or always the one or the other.",
    )
    data: Path | None = Field(
        None, description="Data set whose held-out rows are read to check it.  [default: the run's own]"
    )


class ExportConfig(Settings):
    """Write an adapter or a fused model in another tool's format."""

    source: Path = Field(description="Folder of a training run, or of a fused model.", json_schema_extra=ARGUMENT)
    to: Literal["peft", "hf", "mlx", "gguf", "ollama"] = Field(
        description="peft: the adapter alone; hf, mlx, gguf: the fused model; ollama: the same with a Modelfile. gguf "
        "and ollama take llama and qwen2 models."
    )
    out: Path | None = Field(None, description="Folder of the result.  [default: RUN/export/FORMAT]")
    quantize: Literal["4", "8"] | None = Field(None, description="Bits of the weights of an mlx export.  [default: 16]")
    gguf_type: Literal["f16", "q8_0"] = Field("f16", description="Type of the weights of a gguf or ollama export.")
    verify: bool = Field(True, description="Load the result with its own consumer and hold it against the student.")


class ImportAdapterConfig(Settings):
    """Make a run of an adapter that PEFT wrote."""

    source: Path = Field(description="Folder with adapter_model.safetensors.", json_schema_extra=ARGUMENT)
    run: Path = Field(description="Folder of the run to make, such as adapters/NAME.")
    model: str | None = Field(None, description="Base model.  [default: the one that the adapter names]")


class ShareConfig(Settings):
    """Publish a run on the Hugging Face Hub, with a model card."""

    run: Path = Field(description="Folder of the training run.", json_schema_extra=ARGUMENT)
    repo: str = Field(description="Where to: organisation/name.")
    what: Literal["adapter", "fused", "both"] = Field("adapter", description="What to publish.")
    comparison: Path | None = Field(
        None, description="Folder of the comparison whose scores the card shows.  [default: visuals/NAME of the run]"
    )
    data: bool = Field(False, description="Publish the training rows too, where the teacher's terms allow it.")
    public: bool = Field(False, description="Make a new repository public.  [default: private]")
    dry_run: bool = Field(False, description="Show every file and the card, and send nothing. Needs no token.")
    message: str | None = Field(None, description="Commit message.")


class PullConfig(Settings):
    """Take a shared adapter from the Hugging Face Hub."""

    repo: str = Field(description="organisation/name, with @revision if wanted.", json_schema_extra=ARGUMENT)
    run: Path | None = Field(None, description="Folder of the run to make.  [default: adapters/NAME]")
