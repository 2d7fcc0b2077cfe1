"""What huggingface_hub raises, in our own words: the same ones wherever a call to the Hub fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import NoReturn, TypeVar

from mlx_distill.errors import ModelError, ResourceError

T = TypeVar("T")


def endpoint() -> str | None:
    """The server that stands in for the Hub (`HF_ENDPOINT`); None for the Hub itself.

    Asked for at each call, as huggingface_hub reads the variable only once.
    """
    return os.environ.get("HF_ENDPOINT") or None


def translated(call: Callable[[], T], repo_id: str, revision: str | None = None) -> T:
    """Make a call of huggingface_hub that reads a model, its errors turned into ours.

    Raises:
        ModelError: It is not there, not open to this user, or the Hub cannot be reached.
        ResourceError: The disk is full.
    """
    import httpx2
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return call()
    except GatedRepoError:
        raise ModelError(
            f"{repo_id} is open only to users who accepted its terms.",
            hint=f"Accept them at https://huggingface.co/{repo_id}, then:  hf auth login",
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            f"The Hub has no model {repo_id}, or it is private.",
            hint="Check its name at https://huggingface.co/models; for a private one:  hf auth login",
        ) from None
    except RevisionNotFoundError:
        raise ModelError(
            f"{repo_id} has no revision {revision}.", hint=f"See https://huggingface.co/{repo_id}/commits."
        ) from None
    except (httpx2.HTTPError, OSError) as error:
        _raise_unreachable(error, repo_id)


def reason_of(error: BaseException) -> str:
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _raise_unreachable(error: Exception, repo_id: str) -> NoReturn:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise ResourceError(
            f"The disk filled up while {repo_id} was downloaded.",
            hint="Free some space and run the same command again; what was downloaded is kept.",
        ) from None
    response = getattr(error, "response", None)
    if response is not None and response.status_code == 401:
        raise ModelError(
            f"The Hub does not let you in to {repo_id}: it is private, or your token is not valid (any more).",
            hint="Log in:  hf auth login",
        ) from None
    raise ModelError(
        f"The Hub could not be reached for {repo_id} ({reason_of(error)})."
        if response is None
        else f"The Hub answered {response.status_code} when asked for {repo_id}.",
        hint="Try again with a network (a broken download goes on where it stopped), or name a folder or a .gguf file.",
    ) from None
