"""Where a key comes from: the environment, else the system's keyring; never a file of ours.

export ANTHROPIC_API_KEY=…
keyring set mlx-distill ANTHROPIC_API_KEY        (needs the extra `keyring`)
"""

from __future__ import annotations

import importlib
import os

from mlx_distill.errors import TeacherUnavailableError

#: Service that keys are kept under in a keyring; the user name is the environment variable's.
SERVICE = "mlx-distill"


def find_key(variable: str) -> str | None:
    """The key that an environment variable holds, or the keyring under its name; None where there is none.

    Raises:
        TeacherUnavailableError: It holds a character that no key has; the key is not repeated.
    """
    key, place = os.environ.get(variable, "").strip(), variable
    if not key:
        key, place = (_from_keyring(variable) or "").strip(), f"{variable} in the keyring"
    if not key:
        return None
    if not key.isascii() or not key.isprintable() or " " in key:
        # Told here, because the HTTP library's complaint would repeat the key.
        raise TeacherUnavailableError(
            f"{place} holds a character that no key has.", hint="Look for a space or a line break in it."
        )
    return key


def _from_keyring(variable: str) -> str | None:
    try:
        keyring = importlib.import_module("keyring")
        errors = importlib.import_module("keyring.errors")
    except ImportError:
        return None
    try:
        found = keyring.get_password(SERVICE, variable)
    except errors.KeyringError:
        return None  # Locked, or there is none on this machine: as if it held nothing.
    return found if isinstance(found, str) else None
