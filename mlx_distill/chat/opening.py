"""Opens a conversation with the base model and the student of a run.

Reads: adapters/RUN/{adapters.safetensors,adapter_config.json,run.json} and the base model.  Writes: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mlx_distill.chat.session import Session
from mlx_distill.config import ChatConfig
from mlx_distill.progress import SILENT, Progress
from mlx_distill.records import Contender
from mlx_distill.runs import read_run, resolve_base


@dataclass(frozen=True)
class Opened:
    """A session, and the names of those who speak in it."""

    session: Session
    names: dict[Contender, str]


def open_chat(config: ChatConfig, progress: Progress = SILENT) -> Opened:
    """Load the base model once, and its adapter beside it. What computes is bound to the thread that calls.

    Raises:
        InputError: The run is missing or not finished.
        ModelError: The base model is missing, is another than the run's, has no chat template, or the adapter is
            damaged.
    """
    run = read_run(config.run)
    base = resolve_base(config.run, run, progress)
    with progress.task(f"Loading {base.name} and {config.run}"):
        from mlx_distill.backends.mlx.chatting import open_voices

        plain, adapted = open_voices(Path(base.path), config.run)
    session = Session(
        {"base": plain, "distilled": adapted},
        max_tokens=config.max_tokens,
        system=config.system,
        asked=None if config.only is None else (config.only,),
        temperature=config.temperature,
        seed=config.seed,
    )
    return Opened(session, {"base": base.name, "distilled": config.run.resolve().name})
