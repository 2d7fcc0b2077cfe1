"""A comparison on disk, and a teacher in this process that judges it by rules a test can reckon with."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mlx_distill.judges.base import DIMENSIONS
from mlx_distill.judges.llm import LlmJudge
from mlx_distill.layout import ComparisonFolder, append_row
from mlx_distill.manifest import TeacherTerms
from mlx_distill.records import Contender, Generation, Prompt, Reply, Request, StopReason, Usage

PRICED = "anthropic:claude-sonnet-4-6"


def generation(
    prompt: str, contender: Contender, text: str, *, model: str = "demo-1@0123", stop: StopReason = "end"
) -> Generation:
    return Generation(
        prompt=Prompt(id=prompt, family=prompt, text=f"Write a Python function: {prompt}."),
        contender=contender, model=model, text=text, stop=stop, output_tokens=1, seconds=0, max_tokens=99,
    )  # fmt: skip


def comparison(root: Path, answers: Mapping[tuple[str, Contender], str]) -> ComparisonFolder:
    """A folder with these answers, by prompt and contender."""
    folder = ComparisonFolder(root)
    root.mkdir(parents=True, exist_ok=True)
    for (prompt, contender), text in answers.items():
        append_row(folder.generations, generation(prompt, contender, text))
    return folder


def scores(value: float) -> str:
    """A reply that gives every dimension this score."""
    return json.dumps({name: {"rationale": f"About {name}.", "score": value} for name in DIMENSIONS})


def choice(winner: str) -> str:
    return json.dumps({"rationale": "Because.", "winner": winner})


def question_of(request: Request) -> str:
    return str(request.messages[-1].content)


def answers_in(question: str) -> list[str]:
    """What is quoted as answers, in order."""
    token = question.split("[task ", 1)[1].split("]", 1)[0]
    return re.findall(
        rf"^\[answer(?: [AB])? {token}\]\n(.*?)\n\[end of answer(?: [AB])? {token}\]$", question, re.S | re.M
    )


def by_quality(request: Request) -> str:
    """Scores an answer by the number in it, and prefers the answer with the higher one."""
    found = [float(re.search(r"\d+(?:\.\d+)?", text)[0]) for text in answers_in(question_of(request))]  # type: ignore[index]
    if len(found) == 1:
        return scores(found[0])
    return choice("tie" if found[0] == found[1] else "A" if found[0] > found[1] else "B")


@dataclass
class Panellist:
    """A teacher that says what a function makes of a request; a text is a whole reply.

    Attributes:
        tokens: That each reply is said to have, in and out.
        on_asked: Called with each request before it is answered.
    """

    answer: Callable[[Request], str | Reply] = by_quality
    spec: str = "scripted:judge"
    tokens: int = 10
    on_asked: Callable[[Request], None] = field(default=lambda _request: None)
    asked: list[Request] = field(default_factory=list)
    closed: bool = False

    def terms(self) -> TeacherTerms:
        return TeacherTerms(teacher=self.spec, licence="none", summary="")

    async def ask(self, request: Request) -> Reply:
        self.asked.append(request)
        self.on_asked(request)
        await asyncio.sleep(0)
        found = self.answer(request)
        usage = Usage(input_tokens=self.tokens, output_tokens=self.tokens)
        return found if isinstance(found, Reply) else Reply(text=found, stop="end", model="m", usage=usage)

    async def close(self) -> None:
        self.closed = True

    @property
    def questions(self) -> list[str]:
        return [question_of(request) for request in self.asked]


def judge_of(teacher: Panellist) -> LlmJudge:
    return LlmJudge(teacher)


def refusal() -> Reply:
    return Reply(text="", stop="refusal", stop_reason="refusal", model="m")


def cut() -> Reply:
    return Reply(text='{"correctness": {"ration', stop="length", stop_reason="max_tokens", model="m")
