"""The typed records that cross the seams between steps.

Every record is frozen and refuses unknown keys. Those that open a file of their own carry an integer
`format`, so that a later version can tell what it reads.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Role = Literal["system", "user", "assistant", "tool"]
Split = Literal["train", "valid", "test"]

#: Who answers in a comparison: "teacher", "base", "distilled", or a name that the user gave to another model.
Contender = str

#: The contenders of every comparison, in the order of display; others come after them.
CONTENDERS: tuple[Contender, ...] = ("teacher", "base", "distilled")

#: What a contender may be called.
CONTENDER_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$"

#: Why a teacher stopped, in our own words. "end" is the only one that makes a finished answer.
StopReason = Literal["end", "length", "refusal", "context", "other"]


def content_hash(value: Any) -> str:
    """The SHA-256, in hexadecimal, of a JSON-able value in canonical form."""
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Record(BaseModel):
    """A frozen record that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def to_json(self) -> str:
        """One line of JSON, unset optional fields left out."""
        return self.model_dump_json(exclude_none=True)


class Message(Record):
    """One turn of a chat, with what mlx-lm's chat and tools layouts allow beside the text."""

    role: Role
    content: str | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content or tool_calls")
        return self


class ChatRow(Record):
    """A row of `train.jsonl` in mlx-lm's chat layout."""

    messages: tuple[Message, ...] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None


class Prompt(Record):
    """A prompt, ready to be asked.

    Attributes:
        id: Unique in its file; letters, digits, `-` and `_`, at most 64 (a batch API's rule).
        family: The id of the base prompt. Variations of one prompt share it, and splits go by it.
        field: What it is about, for grouping in reports.
        modifier: The id of the modifier that made this a variation.
    """

    id: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    family: str
    text: str = Field(min_length=1)
    field: str = "general"
    modifier: str | None = None
    system: str | None = None


class Request(Record):
    """What a teacher is asked.

    Attributes:
        sample: Which of the answers to the prompt this asks for, from 0.
        temperature: That the answer is drawn with; None leaves it to the teacher.
    """

    prompt_id: str
    family: str
    teacher: str
    messages: tuple[Message, ...] = Field(min_length=1)
    system: str | None = None
    max_tokens: int = Field(gt=0)
    sample: int = Field(default=0, ge=0)
    temperature: float | None = Field(default=None, ge=0, allow_inf_nan=False)

    @property
    def key(self) -> str:
        """Identity of the request: a hash of all that decides the answer, and of nothing else."""
        return content_hash({**self._content(), "max_tokens": self.max_tokens})

    @property
    def draw_key(self) -> str:
        """As `key`, whatever the token limit: one that is asked again with more tokens is drawn as it was."""
        return content_hash(self._content())

    def _content(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "teacher": self.teacher,
            "system": self.system,
            "messages": [m.model_dump(exclude_none=True) for m in self.messages],
        }
        # Left out where they say nothing: what was paid for before there were samples is found again.
        if self.sample:
            content["sample"] = self.sample
        if self.temperature is not None:
            content["temperature"] = self.temperature
        return content


class Usage(Record):
    """Tokens of one request, as its provider counts them. Zero for a recorded answer."""

    input_tokens: int = Field(default=0, ge=0)
    output_tokens: int = Field(default=0, ge=0)


class Reply(Record):
    """What a teacher answered.

    Attributes:
        stop: Why it stopped, in our words.
        stop_reason: The same in the provider's words.
        category: Of a refusal, in the provider's words, where it gives one.
        model: The model as the provider names it in its reply.
        seconds: Wall time of the request.
    """

    text: str
    stop: StopReason
    stop_reason: str | None = None
    category: str | None = None
    usage: Usage = Usage()
    model: str
    seconds: float = Field(default=0.0, ge=0)


class ModelRecord(Record):
    """Which model was used, so that it can be found again.

    Attributes:
        spec: As the user named it.
        source: "folder", "hub", "gguf" or "bundled".
        path: Where it lay.
        revision: Commit of the Hub, or hash of the source file.
        licence: As its own files state it.
    """

    spec: str
    source: Literal["folder", "hub", "gguf", "bundled"]
    path: str
    name: str
    revision: str | None = None
    licence: str | None = None


class Generation(Record):
    """A row of `generations.jsonl`: one contender's answer to one prompt.

    Attributes:
        sample: Which of the contender's answers to this prompt, from 0. Judges and the page take the first.
        temperature: 0 is greedy. A teacher answers as it does by itself, and its rows say 0.
        seed: What the samples were drawn with.
    """

    format: Literal[1] = 1
    prompt: Prompt
    contender: Contender = Field(pattern=CONTENDER_PATTERN)
    sample: int = Field(default=0, ge=0)
    model: str
    text: str
    stop: StopReason
    output_tokens: int = Field(ge=0)
    seconds: float = Field(ge=0)
    max_tokens: int = Field(gt=0)
    repetition_penalty: float = 1.0
    temperature: float = 0.0
    seed: int = 0

    @property
    def finished(self) -> bool:
        """Whether the answer ended by itself, not by the token budget."""
        return self.stop == "end"

    @property
    def answer_sha256(self) -> str:
        """What ties a verdict to this very text."""
        return content_hash(self.text)


class DimensionScore(Record):
    """A score from 0 to 10 with what it rests on."""

    score: float = Field(ge=0, le=10)
    rationale: str


class Verdict(Record):
    """A row of `verdicts.jsonl`: one judge's scores for one answer.

    Attributes:
        judge: "rubric", or the spec of the model that judged.
        answer_sha256: Hash of the text judged, so that a verdict is never shown with another answer.
        scores: By dimension id. Empty where the verdict could not be read: missing, never zero.
        problem: Why it could not be read.
    """

    format: Literal[1] = 1
    prompt_id: str
    contender: Contender = Field(pattern=CONTENDER_PATTERN)
    judge: str
    answer_sha256: str
    scores: dict[str, DimensionScore] = {}
    problem: str | None = None

    @property
    def overall(self) -> float | None:
        """The unweighted mean over the dimensions, or None where nothing was scored."""
        if not self.scores:
            return None
        return sum(s.score for s in self.scores.values()) / len(self.scores)


class ComparisonRecord(Record):
    """`comparison.json`: what the answers in `generations.jsonl` were made with.

    Attributes:
        name: Of the comparison, and of its folder.
        run: Folder of the training run, as given.
        teacher: Its spec; None where base and student were compared alone.
        models: What answered, by contender, in the order of display.
        prompts: The prompt file, as given; None where tasks alone were asked.
        prompts_sha256: Of all that was asked.
        evals: Sets of tasks that were asked too, as given.
        tasks_sha256: By the id of each task, the hash of all that decides how an answer to it is scored.
        samples: Answers of a local model to each prompt.
        max_tokens: The one token budget of all contenders.
        device: Where the local models ran.
        seconds: Wall time of all answers of a contender.
        tokens_per_second: Tokens written in that time; a recorded teacher has none.
    """

    format: Literal[1] = 1
    name: str
    run: str
    created: str
    teacher: str | None = None
    models: dict[Contender, str]
    prompts: str | None = None
    prompts_sha256: str
    evals: tuple[str, ...] = ()
    tasks_sha256: dict[str, str] = {}
    samples: int = Field(default=1, gt=0)
    temperature: float = 0.0
    seed: int = 0
    max_tokens: int = Field(gt=0)
    repetition_penalty: float = 1.0
    device: str
    seconds: dict[Contender, float] = {}
    tokens_per_second: dict[Contender, float] = {}
