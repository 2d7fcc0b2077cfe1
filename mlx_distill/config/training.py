"""What can be set of training, and of what comes before and beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from mlx_distill.settings import ARGUMENT, Settings

#: Likeliest tokens kept at each position of a teacher's logits.
DEFAULT_TOP_K = 64

DEFAULT_STUDENT = "Qwen/Qwen2.5-1.5B-Instruct"

#: A size of memory, as a person writes it.
SIZE_PATTERN = r"^\d+(\.\d+)?(MB|GB|MiB|GiB)$"

_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def size_in_bytes(text: str) -> int:
    """Bytes of a size written as `SIZE_PATTERN` has it: 6GB, 512MiB."""
    unit = next(name for name in sorted(_UNITS, key=len, reverse=True) if text.endswith(name))
    return int(float(text.removesuffix(unit)) * _UNITS[unit])


class PruneConfig(Settings):
    """Make a smaller student by taking layers out of a model."""

    model: str = Field(description="Model: folder, Hub id, .gguf file, or smollm2-135m.", json_schema_extra=ARGUMENT)
    keep_layers: int = Field(gt=0, description="Layers to keep; the others go, one after the other.")
    out: Path = Field(description="Folder of the smaller model.")
    data: Path | None = Field(
        None, description="Data set whose rows the loss is measured on.  [default: the answers that ship]"
    )
    rows: int = Field(16, gt=0, description="Rows to measure on, each of up to 512 tokens.")


class LogitsConfig(Settings):
    """Write what a local teacher says at every position of a data set, for a student to learn."""

    data: Path = Field(description="Folder with train.jsonl and, if you have them, valid.jsonl and test.jsonl.")
    teacher: str = Field(description="mlx:MODEL: folder, Hub id, .gguf file, or smollm2-135m; quantized or not.")
    top_k: int = Field(
        DEFAULT_TOP_K, gt=0, description="Likeliest tokens kept at each position; all others are kept as one sum."
    )
    out: Path | None = Field(None, description="Folder of the logits.  [default: DATA/logits/TEACHER-K]")
    batch_size: int = Field(8, gt=0, description="Rows read at once.")
    max_length: int = Field(2048, gt=1, description="Rows longer than this many tokens are left out.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the teacher's weights: auto is its own on a GPU, float32 on a CPU."
    )


class TrainConfig(Settings):
    """Train a LoRA adapter on a data set."""

    data: Path = Field(description="Folder with train.jsonl and, if you have them, valid.jsonl and test.jsonl.")
    model: str = Field(DEFAULT_STUDENT, description="Student: folder, Hub id, .gguf file, or smollm2-135m.")
    run: Path = Field(description="Folder of the run, such as adapters/NAME.")
    backend: Literal["mlx", "torch"] = Field(
        "mlx", description="What computes; torch is the reference, with transformers and peft."
    )
    device: Literal["auto", "mps", "cuda", "cpu"] = Field(
        "auto", description="What the torch backend computes on; MLX takes its own default."
    )
    epochs: int = Field(3, gt=0, description="Passes over the training rows.")
    batch_size: int = Field(4, gt=0, description="Rows an optimizer step learns from.")
    micro_batch_size: int | None = Field(
        None,
        gt=0,
        description="Rows computed at once; fewer save memory, the update is the same.  [default: as many as fit]",
    )
    memory_limit: str | None = Field(
        None,
        pattern=SIZE_PATTERN,
        description="Memory that training may take, such as 6GB: micro-batches, checkpointing and cache are chosen to "
        "stay under it.  [default: what the machine has]",
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        "auto", description="Compute each layer twice and keep less in memory: auto where it would not fit otherwise."
    )
    prefix_cache: Literal["auto", "memory", "disk", "off"] = Field(
        "auto",
        description="Where to keep the output of the frozen layers, computed once a row: memory, disk, off, or auto by "
        "what fits.",
    )
    adapter: Literal["lora", "dora"] = Field("lora", description="Kind of adapter.")
    rank: int = Field(8, gt=0, description="Rank of the LoRA matrices.")
    scale: float = Field(2.0, gt=0, description="Factor of the LoRA update (alpha / rank).")
    rslora: bool = Field(False, description="Rank-stabilised LoRA: the factor is scale times the root of the rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout before the LoRA matrices.")
    layers: Annotated[int, Field(gt=0)] | Literal["all"] = Field(
        16, description="Transformer layers that get an adapter, counted from the last; or all."
    )
    targets: str = Field(
        "all", description="Matrices of those layers that get one, by name, such as q_proj,v_proj; or all."
    )
    distill: Literal["off", "forward-kl", "reverse-kl", "jsd"] = Field(
        "off",
        description="Learn a teacher's distribution, from --teacher-logits or --teacher-online, by this divergence: "
        "forward-kl covers all the teacher says, reverse-kl keeps to what it would say, jsd is between.",
    )
    teacher_logits: Path | None = Field(
        None, description="Folder that  mlx-distill logits  wrote for this --data. Needs --distill."
    )
    teacher_online: str | None = Field(
        None,
        description="mlx:MODEL, asked during training in place of --teacher-logits; teacher and student are then both "
        "in memory. Needs --distill.",
    )
    on_policy: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the batches, 0 to 1, in which the student writes the answers and learns what the teacher "
        "says of them. Needs --teacher-online and --backend mlx; the slowest way.",
    )
    on_policy_tokens: int = Field(256, gt=0, description="Tokens of an answer that the student writes, at most.")
    on_policy_temperature: float = Field(1.0, gt=0, le=2, description="Sampling temperature of those answers.")
    distill_weight: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the divergence in the loss; the cross-entropy of the text has the rest. 1 learns from "
        "the teacher's distribution alone, 0.5 from both. Of answers the student writes, only the divergence counts.",
    )
    distill_temperature: float = Field(
        1.0,
        gt=0,
        le=100,
        description="Temperature that teacher and student are both softened by; 1 changes nothing.",
    )
    distill_beta: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Only with jsd: near 0 it behaves as forward-kl, near 1 as reverse-kl. Its size shrinks with beta "
        "or 1 - beta.",
    )
    optimizer: Literal["adamw", "adam", "lion", "adafactor", "muon"] = Field("adamw", description="Optimizer.")
    learning_rate: float = Field(2e-4, gt=0, description="Peak learning rate.")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="Learning rate after warm-up.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of all steps over which the learning rate rises.")
    final_learning_rate: float = Field(0.1, ge=0, le=1, description="Where the schedule ends, as a share of the peak.")
    weight_decay: float = Field(0.01, ge=0, description="Decoupled weight decay of AdamW, Lion, Adafactor and Muon.")
    grad_clip: float | None = Field(
        1.0, gt=0, description="Largest gradient norm; longer gradients are shortened to it."
    )
    validate_every: int | None = Field(
        None, gt=0, description="Optimizer steps between validations, beside the one at each epoch's end."
    )
    patience: int | None = Field(
        None, gt=0, description="Stop after this many validations in a row without a lower loss.  [default: never]"
    )
    max_length: int = Field(
        2048, gt=1, description="Rows longer than this many tokens are left out and counted, never cut."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the adapter's start, the order of rows and dropout.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the frozen weights: auto is the model's own on a GPU, float32 on a CPU."
    )
    checkpoint_every: int = Field(
        50, gt=0, description="Optimizer steps between checkpoints; every epoch's end makes one too."
    )
    keep_checkpoints: int = Field(2, gt=0, description="Newest checkpoints to keep.")
    finish: bool = Field(
        False,
        description="End an interrupted or diverged run at its last checkpoint: nothing more is trained, and its best "
        "adapter so far is the result.",
    )
    report_to: str | None = Field(
        None, description="Also send the metrics to wandb, tensorboard or trackio; several with commas."
    )

    @model_validator(mode="after")
    def _distillation_is_whole(self) -> Self:
        sources = [name for name in ("teacher_logits", "teacher_online") if getattr(self, name) is not None]
        if self.distill != "off" and len(sources) != 1:
            raise ValueError(
                "distill needs a teacher: teacher_logits, the folder that  mlx-distill logits  wrote, or teacher_online"
            )
        if self.distill == "off" and sources:
            raise ValueError(f"{sources[0]} is of no use without distill, such as forward-kl")
        if self.on_policy and self.teacher_online is None:
            raise ValueError("on_policy needs teacher_online: nobody knows before what the student will write")
        return self


class RunsConfig(Settings):
    """List training runs side by side."""

    folder: Path = Field(Path("adapters"), description="Folder of the runs, or of one.", json_schema_extra=ARGUMENT)
    sort: Literal["created", "loss", "divergence", "accuracy", "time"] = Field(
        "created",
        description="What comes first: the newest, the lowest loss, the smallest divergence from the teacher, the best "
        "accuracy, the shortest time.",
    )


class BenchConfig(Settings):
    """Time MLX against PyTorch on the same batches."""

    model: str = Field(DEFAULT_STUDENT, description="Student: folder, Hub id, .gguf file, or smollm2-135m.")
    backends: str = Field("mlx,torch", description="What to time, separated by commas; ratios are the first's.")
    data: Path | None = Field(None, description="Folder with train.jsonl.  [default: the starter answers]")
    preset: Literal["original"] | None = Field(
        None, description="original: 104 rows, five epochs, all of them, once: the workload this project began with."
    )
    peers: bool = Field(False, description="Also time mlx_lm.lora and TRL's SFTTrainer, where they are installed.")
    quick: bool = Field(False, description="A few short rows, two epochs, two turns: under two minutes on two cores.")
    rows: int = Field(32, gt=0, description="Rows to train on.")
    epochs: int = Field(2, gt=0, description="Passes over them; the first one is told apart.")
    repeats: int = Field(3, gt=0, description="Turns of each backend, one after the other.")
    batch_size: int = Field(4, gt=0, description="Rows an optimizer step learns from.")
    rank: int = Field(8, gt=0, description="Rank of the LoRA matrices.")
    layers: Annotated[int, Field(gt=0)] | Literal["all"] = Field(
        16, description="Transformer layers that get an adapter, counted from the last; or all."
    )
    max_length: int = Field(2048, gt=1, description="Rows longer than this many tokens are left out.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="Type of the frozen weights.")
    device: Literal["auto", "mps", "cuda", "cpu"] = Field("auto", description="What the torch backend computes on.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the adapter's start and the order of rows.")
    out: Path = Field(Path("visuals/bench"), description="Folder of the results.")
    timeout: float = Field(3600, gt=0, description="Seconds after which one process is taken to hang.")


class DoctorConfig(Settings):
    """Show what this machine has, and how to get what it lacks."""

    speed: bool = Field(True, description="Measure the speed of a matrix product.")
