"""A teacher in this process that gives each prompt the answers a test lists, one a sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_distill.config import CollectConfig
from mlx_distill.layout import read_rows
from mlx_distill.manifest import Manifest, TeacherTerms
from mlx_distill.records import ChatRow, Reply, Request, Usage


@dataclass
class Sampled:
    """Answers in process.

    Attributes:
        answers: By prompt text, in the order of the samples.
        tokens: That each reply is said to have, in and out.
    """

    answers: Mapping[str, Sequence[str]]
    spec: str = "scripted:x"
    tokens: int = 0
    asked: list[Request] = field(default_factory=list)

    def terms(self) -> TeacherTerms:
        return TeacherTerms(teacher=self.spec, licence="MIT", summary="free")

    async def ask(self, request: Request) -> Reply:
        self.asked.append(request)
        text = self.answers[request.messages[-1].content or ""][request.sample]
        usage = Usage(input_tokens=self.tokens, output_tokens=self.tokens)
        return Reply(text=text, stop="end", model="m", usage=usage)

    async def close(self) -> None:
        """Nothing is open."""


def config_for(folder: Path, prompts: str | Path, samples: int, **changes: object) -> CollectConfig:
    """Settings that keep all rows in train and take no two answers for duplicates, unless changed."""
    values = {"prompts": folder / prompts, "teacher": "scripted:x", "out": folder / "out", "samples": samples}
    more = {"valid_fraction": 0, "test_fraction": 0, "duplicate_threshold": 0, **changes}
    return CollectConfig.model_validate({**values, **more})


def rows_of(config: CollectConfig) -> list[tuple[str, str]]:
    """Prompt and answer of each row."""
    rows = read_rows(config.out / "train.jsonl", ChatRow)
    return [(row.messages[-2].content or "", row.messages[-1].content or "") for row in rows]


def dropped(manifest: Manifest) -> dict[str, tuple[int, tuple[str, ...]]]:
    """By reason how many answers, and of which prompts."""
    return {drop.reason: (drop.count, drop.prompt_ids) for drop in manifest.dropped}
