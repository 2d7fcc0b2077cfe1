"""What the machine can get at: keys, the Hub, the bundled student.

Of a key nothing but whether it is set leaves this module, and none is sent anywhere.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from mlx_distill.config import DEFAULT_STUDENT
from mlx_distill.doctor.finding import Finding
from mlx_distill.progress import SILENT, Progress

#: Seconds that the Hub gets to connect, and again to answer.
_HUB_SECONDS = 3.0


def anthropic_key() -> list[Finding]:
    """The key of `anthropic:MODEL` teachers and judges."""
    name = "ANTHROPIC_API_KEY"
    key = os.environ.get(name, "").strip()
    if key and key.isascii() and key.isprintable() and " " not in key:
        return [Finding(name, "ok", "set")]
    if key:
        remedy = f"It holds a character that no key has, such as a space; set it again:  export {name}=…"
        return [Finding(name, "warning", "set", remedy)]
    remedy = f"For anthropic:MODEL (recorded:PATH needs none):  export {name}=…"
    return [Finding(name, "missing", "not set", remedy)]


def hub_token() -> list[Finding]:
    """The Hub's token, from the environment or where `hf auth login` stores it."""
    if not _set("HF_TOKEN") and not _set("HUGGING_FACE_HUB_TOKEN"):
        from huggingface_hub import constants

        stored = Path(constants.HF_TOKEN_PATH)
        # As bytes: the message of a failed decoding would quote them.
        if not (stored.is_file() and stored.read_bytes().strip()):
            return [Finding("HF_TOKEN", "missing", "not set", "For gated and private models:  hf auth login")]
    return [Finding("HF_TOKEN", "ok", "set")]


def hub(progress: Progress = SILENT) -> list[Finding]:
    """Whether the Hub, or what `HF_ENDPOINT` names in its place, answers as a Hub does."""
    from mlx_distill.models.hub import offline

    if offline():
        return [
            Finding(
                "Hub",
                "warning",
                "not asked: MLX_DISTILL_OFFLINE or HF_HUB_OFFLINE is set",
                "unset MLX_DISTILL_OFFLINE HF_HUB_OFFLINE",
            )
        ]
    import httpx2
    from huggingface_hub import constants, get_session

    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    try:
        # What stands before the @ is a password.
        host = urlsplit(endpoint).netloc.rpartition("@")[2]
        url = httpx2.URL(f"{endpoint}/api/models/{DEFAULT_STUDENT}")
    except (ValueError, httpx2.InvalidURL):
        host = ""
    if not host or url.scheme not in ("http", "https"):
        return [Finding("Hub", "warning", "HF_ENDPOINT is not the address of a server", "unset HF_ENDPOINT")]
    with progress.task("Asking the Hub"):
        try:
            answer = get_session().get(url, timeout=_HUB_SECONDS)
        except httpx2.TimeoutException:
            return [_unreachable(f"{host} does not answer within {_HUB_SECONDS:g} s")]
        except httpx2.HTTPError as error:
            return [_unreachable(f"{host} cannot be reached, {type(error).__name__}: {error}")]
    if answer.status_code >= 500 or answer.status_code == 429:
        return [_unreachable(f"{host} answers {answer.status_code}")]
    try:
        answer.json()
    except ValueError:
        return [_unreachable(f"{host} answers {answer.status_code}, but not as a Hub does")]
    return [Finding("Hub", "ok", f"{host} answers")]


def students() -> list[Finding]:
    """Whether the students that need no Hub are here."""
    from mlx_distill.models.bundled import BUNDLED
    from mlx_distill.models.gguf import cached_folder
    from mlx_distill.models.hub import cached

    rows = []
    for name, model in BUNDLED.items():
        if cached_folder(model.sha256).is_dir() or cached(model.hub_id) is not None:
            rows.append(Finding(name, "ok", "here"))
        else:
            remedy = f"mlx-distill demo   (its first call fetches {model.size / 1e6:.0f} MB)"
            rows.append(Finding(name, "missing", "not fetched yet", remedy))
    return rows


def _unreachable(found: str) -> Finding:
    remedy = "Look at the network, or name a mirror:  export HF_ENDPOINT=https://…   (smollm2-135m works without)"
    return Finding("Hub", "warning", found, remedy)


def _set(variable: str) -> bool:
    return bool(os.environ.get(variable, "").strip())
