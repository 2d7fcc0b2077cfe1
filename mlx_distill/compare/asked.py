"""The answers of contenders that are asked through a ledger, with its budget: what is paid for is kept, and once."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_distill import layout
from mlx_distill.asking import ask_all, run_interruptible
from mlx_distill.budget import Budget
from mlx_distill.compare.contenders import AskedContender
from mlx_distill.config import CompareConfig
from mlx_distill.errors import TeacherError
from mlx_distill.ledger import Ledger
from mlx_distill.pricing import price_of
from mlx_distill.progress import Progress
from mlx_distill.records import Generation, Message, Prompt, Request
from mlx_distill.teachers.base import request_name
from mlx_distill.teachers.registry import open_teacher


def ask(
    contender: AskedContender,
    prompts: Sequence[Prompt],
    optional: frozenset[str],
    config: CompareConfig,
    folder: layout.ComparisonFolder,
    progress: Progress,
) -> list[Generation]:
    """Ask for every answer that the ledger does not hold, and give all.

    Args:
        optional: Ids of prompts that a teacher of recorded answers may not know.

    Raises:
        ConfigError: The budget cannot be held.
        TeacherError: Some prompts were not answered. What was is kept.
    """

    async def whole() -> list[Generation]:
        teacher = open_teacher(contender.model, base_url=contender.base_url)
        requests = [_request(prompt, request_name(teacher), config.max_tokens) for prompt in prompts]
        try:
            with Ledger(folder.teacher_ledger) as ledger:
                budget = Budget(price_of(teacher.spec), config.max_cost, ledger.spending())
                asked = await ask_all(
                    requests,
                    teacher,
                    ledger,
                    concurrency=config.concurrency,
                    progress=progress,
                    title=f"Asking {contender.name}",
                    budget=budget,
                )
                entries = ledger.entries(request.key for request in requests)
                replies = {entry.request.key: entry.reply for entry in entries if entry.reply is not None}
        finally:
            await teacher.close()
        without = [request.prompt_id for request in requests if request.key not in replies]
        if contender.model.startswith("recorded:"):
            if unknown := [name for name in without if name in optional]:
                progress.say(f"{contender.model} has no answer to {len(unknown)} of {len(optional)} tasks.")
            without = [name for name in without if name not in optional]
        if without:
            raise _unanswered(contender, without, len(requests), asked.left, config)
        return [
            Generation(
                prompt=prompt,
                contender=contender.name,
                model=contender.model,
                text=reply.text,
                stop=reply.stop,
                output_tokens=reply.usage.output_tokens,
                seconds=reply.seconds,
                max_tokens=config.max_tokens,
            )
            for prompt, request in zip(prompts, requests, strict=True)
            if (reply := replies.get(request.key)) is not None
        ]

    rows = run_interruptible(whole())
    for row in rows:
        layout.append_row(folder.generations, row)
    return rows


def _request(prompt: Prompt, teacher: str, max_tokens: int) -> Request:
    return Request(
        prompt_id=prompt.id,
        family=prompt.family,
        teacher=teacher,
        messages=(Message(role="user", content=prompt.text),),
        system=prompt.system,
        max_tokens=max_tokens,
    )


def _unanswered(
    contender: AskedContender, without: Sequence[str], total: int, left: int, config: CompareConfig
) -> TeacherError:
    named = ", ".join(without[:10]) + (", …" if len(without) > 10 else "")
    reason = f" The budget of ${config.max_cost:g} left no room for {left}." if left else ""
    return TeacherError(
        f"{contender.model} left {len(without)} of {total} prompts unanswered: {named}.{reason}",
        hint="The same command asks again for these alone" + (", with a higher --max-cost." if left else "."),
    )
