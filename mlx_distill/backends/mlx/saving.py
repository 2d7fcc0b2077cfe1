"""Write a model as mlx-lm does, its errors turned into ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import save_config, save_model

from mlx_distill.errors import ResourceError


def write_model(model: nn.Module, config: dict[str, Any], out: Path, *, what: str) -> None:
    """Write weights and configuration. The model gives its weights away and is of no use afterwards.

    Args:
        config: As mlx-lm's `load_model` gives it.
        out: A folder without weights.
        what: Is written, for an error, with its article.

    Raises:
        ResourceError: The weights cannot be written, as on a full disk.
    """
    try:
        save_model(out, model, donate_model=True)
    except RuntimeError as error:
        # MLX has no other for a file that it cannot write.
        raise ResourceError(
            f"{what} could not be written to {out.parent}: {error}", hint="Free some space there."
        ) from error
    save_config(config, out / "config.json")
