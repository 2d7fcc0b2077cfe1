"""What a teacher is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from mlx_distill.manifest import TeacherTerms
from mlx_distill.records import Reply, Request


class Teacher(Protocol):
    """Answers requests. Implementations live one a file in this package."""

    #: As the user named it, such as "anthropic:claude-sonnet-4-6".
    spec: str

    def terms(self) -> TeacherTerms:
        """What may be done with the answers. `accepted` is False here; the user's consent sets it."""
        ...

    async def ask(self, request: Request) -> Reply:
        """Answer one request. May be called many times at once.

        Raises:
            TeacherError: It could not be answered, and asking again now would not help.
        """
        ...

    async def close(self) -> None:
        """Let go of connections and files."""
        ...


@runtime_checkable
class Revisioned(Protocol):
    """A teacher whose answers can change under the same spec, such as a folder that is edited."""

    #: Hash or commit of what answers.
    revision: str


def request_name(teacher: Teacher) -> str:
    """What `Request.teacher` holds: the spec, and the revision of a teacher that has one."""
    return f"{teacher.spec}@{teacher.revision}" if isinstance(teacher, Revisioned) else teacher.spec
