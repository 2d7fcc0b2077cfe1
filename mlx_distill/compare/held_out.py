"""The teacher's answers that the student did not learn from, to see how likely models find them.

Reads: data/NAME/{test,valid}.jsonl.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mlx_distill import layout
from mlx_distill.agreement import ProbeRow
from mlx_distill.dataset import tokenise_split
from mlx_distill.errors import MlxDistillError
from mlx_distill.models.folder import context_length
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.progress import Progress
from mlx_distill.records import Split, content_hash
from mlx_distill.run_records import RunRecord

#: Splits, the best first. Rows of training say nothing of what was learned.
_PREFERRED: tuple[Split, ...] = ("test", "valid")


def held_out_rows(run: RunRecord, model: Path, limit: int, progress: Progress) -> dict[str, ProbeRow]:
    """Held-out rows of the run's own data, spread over the file, by the hash of their tokens.

    Args:
        model: Folder of the base, whose tokenizer the student shares.
        limit: Rows at most.

    Returns:
        None at all where the data set is gone, or has none held out; that is said.
    """
    if not limit or "data" not in run.config:
        return {}
    tokenizer: Any = load_tokenizer(model)
    length = min(context_length(model) or 2**31 - 1, int(run.config.get("max_length", 2**31 - 1)))
    for name in _PREFERRED:
        path = layout.DataFolder(Path(run.config["data"])).split(name)
        try:
            if not path.is_file() or path.stat().st_size == 0:
                continue
            rows = tokenise_split(path, tokenizer, max_length=length).rows
        except (MlxDistillError, OSError) as error:
            progress.say(f"{path}: held-out answers cannot be read ({error}); perplexity and divergence are left out.")
            return {}
        found: dict[str, ProbeRow] = {}
        for at in np.unique(np.linspace(0, len(rows) - 1, min(limit, len(rows))).astype(int)) if len(rows) else []:
            tokens = tuple(rows[int(at)].tokens.tolist())
            positions = tuple((np.flatnonzero(rows[int(at)].loss_mask) - 1).tolist())
            if positions:
                found[content_hash(list(tokens))] = ProbeRow(tokens=tokens, positions=positions)
        if found:
            return found
    progress.say("The run's data has no held-out answers: perplexity and divergence are left out.")
    return {}
