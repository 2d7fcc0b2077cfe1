"""How the loopback server says no."""

from __future__ import annotations


class RefusedError(Exception):
    """A request that the real API would refuse, too."""

    def __init__(self, status: int, error_type: str, message: str) -> None:
        super().__init__(message)
        self.status, self.error_type, self.message = status, error_type, message


def invalid(message: str) -> RefusedError:
    """The refusal of a request that is not well formed."""
    return RefusedError(400, "invalid_request_error", message)
