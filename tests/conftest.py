"""What all tests share. Set before anything imports MLX or huggingface_hub: no compiler, no Hub."""

from __future__ import annotations

import os

# On a CPU, MLX's compile calls the C++ compiler at run time: 27 s instead of 0.4 s for twenty steps of a tiny model.
os.environ["MLX_DISABLE_COMPILE"] = "1"
# Tiny matrices gain nothing from a second thread, and beside other work spinning threads cost tenfold.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# torch's.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["MLX_DISTILL_OFFLINE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest

# Before a command that is called in this process leaves torch out of it: other tests need it.
import transformers  # noqa: F401
from hypothesis import settings

# Before any test imports MLX: it loads the fast BLAS. Without it, the real model takes ten times as long.
import mlx_distill.backends.mlx  # noqa: F401
from mlx_distill.models.resolve import resolve
from tests.tiny import make_tiny_model

# How long an example takes is a matter of what else the machine does.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Folder of the converted SmolLM2-135M-Instruct. Fetched and converted on a machine's first run, then kept in
    the user's cache; do not write into it."""
    return Path(resolve("smollm2-135m").path)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random Qwen2 model with a chat template: 4 layers, 384 tokens. Do not write into it."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of another, wider model than `tiny_model`, with the same tokenizer. Do not write into it."""
    return make_tiny_model(tmp_path_factory.mktemp("teacher") / "model", seed=5, hidden=96)
