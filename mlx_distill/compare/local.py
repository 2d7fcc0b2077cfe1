"""The answers of contenders on this machine, in batches, and how they like the teacher's held-out answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mlx_distill import layout
from mlx_distill.agreement import ProbeRow
from mlx_distill.compare.contenders import LocalContender
from mlx_distill.compare.distribution import Distribution
from mlx_distill.config import CompareConfig
from mlx_distill.progress import Progress
from mlx_distill.records import Generation, Message, Prompt
from mlx_distill.scores import HeldOutLoss

if TYPE_CHECKING:
    from mlx_distill.backends.mlx.generation import Generator

#: A prompt, and which of the answers to it.
Wanted = tuple[Prompt, int]


def answer(
    contender: LocalContender,
    wanted: Sequence[Wanted],
    rows: dict[str, ProbeRow],
    teacher: Distribution | None,
    config: CompareConfig,
    folder: layout.ComparisonFolder,
    progress: Progress,
) -> tuple[list[Generation], str]:
    """Load a model once; have it answer, and read rows.

    Args:
        rows: To read, by the hash of their tokens.
        teacher: What a local teacher says of these rows.

    Returns:
        Its answers, and the device that it ran on.

    Raises:
        ModelError: It does not load.
        InputError: A prompt does not fit into its context.
    """
    from mlx_distill.backends.mlx.drawing import Sampling
    from mlx_distill.backends.mlx.generation import Generator

    with progress.task(f"Loading {contender.name}"):
        generator = Generator(contender.folder)
    made: list[Generation] = []
    # Answers mostly end before the budget, so the bar counts tokens without a total.
    count = "1 prompt" if len(wanted) == 1 else f"{len(wanted)} prompts"
    title = f"{contender.name.capitalize()} answers {count}"
    with progress.task(title, unit="tokens") as bar:
        answers = generator.answer(
            [_conversation(prompt) for prompt, _ in wanted],
            max_tokens=config.max_tokens,
            repetition_penalty=config.repetition_penalty,
            batch_size=config.batch_size,
            names=[prompt.id for prompt, _ in wanted],
            sampling=[Sampling.of(config.temperature, config.seed, prompt.id, sample) for prompt, sample in wanted],
            bar=bar,
        )
        for found in answers:
            prompt, sample = wanted[found.index]
            row = Generation(
                prompt=prompt,
                contender=contender.name,
                sample=sample,
                model=contender.model,
                text=found.text,
                stop=found.stop,
                output_tokens=found.tokens,
                seconds=round(found.seconds, 3),
                max_tokens=config.max_tokens,
                repetition_penalty=config.repetition_penalty,
                temperature=config.temperature,
                seed=config.seed,
            )
            layout.append_row(folder.generations, row)
            made.append(row)
    if rows:
        with progress.task(f"{contender.name.capitalize()} reads the teacher's held-out answers", len(rows)) as bar:
            for sha256, row_ in rows.items():
                layout.append_row(folder.held_out, _loss(contender, sha256, row_, generator, teacher))
                bar.advance()
    return made, generator.device


def _loss(
    contender: LocalContender, sha256: str, row: ProbeRow, generator: Generator, teacher: Distribution | None
) -> HeldOutLoss:
    found = generator.read(row, teacher.buckets[sha256] if teacher else None)
    loss = HeldOutLoss(
        row_sha256=sha256, contender=contender.name, model=contender.model, nll=found.nll, tokens=len(row.positions)
    )
    if teacher is None or found.divergence is None:
        return loss
    # What is no number cannot be written as one, and reading it again would not make it one.
    known = found.divergence if math.isfinite(found.divergence) else None
    return loss.model_copy(update={"divergence": known, "teacher": teacher.teacher, "top_k": teacher.top_k})


def _conversation(prompt: Prompt) -> list[Message]:
    system = [Message(role="system", content=prompt.system)] if prompt.system else []
    return [*system, Message(role="user", content=prompt.text)]
