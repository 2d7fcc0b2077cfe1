"""What tests of training share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.training.faults import Writes, watched_writes


@pytest.fixture
def writes() -> Iterator[Writes]:
    """The durable writes of this process, which may be made to fail."""
    with watched_writes() as watched:
        yield watched
