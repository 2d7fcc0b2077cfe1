"""What can be set of prompts, of asking a teacher, and of what that costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from mlx_distill.settings import ARGUMENT, Settings

#: Whether programs run in the system's sandbox: where there is one that holds, always, or never.
Confinement = Literal["auto", "required", "off"]

#: Which of the answers to one prompt become rows.
Choose = Literal["all", "first", "shortest", "best"]


class PromptsConfig(Settings):
    """Expand a prompt file into the prompts to ask."""

    file: Path = Field(
        description="Prompts as TOML (with modifiers, or tasks with hidden tests), JSONL or plain text, one a line.",
        json_schema_extra=ARGUMENT,
    )
    out: Path | None = Field(None, description="Write the expanded prompts here, as JSONL.")
    modifiers: bool = Field(True, description="Add the variations that the file's modifiers make.")


class CollectConfig(Settings):
    """Ask a teacher every prompt and make a data set of its answers."""

    prompts: Path = Field(description="Prompts: TOML, JSONL or plain text; or tasks with hidden tests, as TOML.")
    teacher: str = Field(description="anthropic:MODEL, openai:MODEL, mlx:MODEL or recorded:PATH.")
    base_url: str | None = Field(None, description="Server of an openai: teacher, such as http://127.0.0.1:8080/v1.")
    out: Path = Field(
        default_factory=Path, description="Folder of the data set.  [default: data/NAME of the prompt file]"
    )
    system: str | None = Field(None, description="System prompt, sent with every prompt and kept in every row.")
    max_tokens: int = Field(4096, gt=0, description="Token limit of an answer.")
    samples: int = Field(1, gt=0, le=100, description="Answers asked for to each prompt.")
    temperature: float | None = Field(
        None,
        ge=0,
        le=2,
        description="Sampling temperature of an mlx: or openai: teacher; without it a local model is greedy, and "
        "others answer as they do by themselves.",
    )
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
        description="Files of prompts or tasks, separated by commas, that the prompts are held against: those too "
        "close are left out. builtin: the tasks of data/eval.",
    )
    duplicate_threshold: float = Field(
        0.9,
        ge=0,
        le=1,
        description="Similarity from which a row is left out as a duplicate of an earlier one; 0 keeps all.",
    )
    verify: bool = Field(
        False,
        description="Run the Python in the answers, in a process apart; needs your trust. Answers to tasks must pass "
        "their hidden tests.",
    )
    keep_failing: bool = Field(False, description="Train also on answers that fail.")
    sandbox: Confinement = Field(
        "auto",
        description="Whether --verify and the rubric run programs in the system's sandbox: auto where there is one "
        "that holds, required always, off never. It comes with the extra sandbox.",
    )
    choose: Choose = Field(
        "all",
        description="Which of a prompt's answers become rows, of those that nothing else leaves out: all, the first, "
        "the shortest, or the best by a judge.",
    )
    judge: str = Field(
        "rubric",
        description="Who says which answer is best: rubric (offline; runs their code), anthropic:MODEL, openai:MODEL, "
        "mlx:MODEL or recorded:PATH.",
    )
    judge_url: str | None = Field(None, description="Server of an openai: judge.")

    @model_validator(mode="before")
    @classmethod
    def _name_folder(cls, values: Any) -> Any:
        if isinstance(values, dict) and "out" not in values and isinstance(values.get("prompts"), (str, Path)):
            return {**values, "out": Path("data") / Path(values["prompts"]).stem}
        return values

    @model_validator(mode="after")
    def _judge_has_something_to_do(self) -> Self:
        unasked = (type(self).model_fields["judge"].default, None)
        if self.choose != "best" and (self.judge, self.judge_url) != unasked:
            raise ValueError("a judge is asked where the best answers are chosen: give choose = best with judge")
        return self

    @property
    def ceiling(self) -> int:
        """The highest token limit of an answer; never below the first."""
        return max(self.max_tokens, self.max_tokens_ceiling)


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
