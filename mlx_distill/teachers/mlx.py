"""A local open-weight model as a teacher: no key, no network, no bill.

Whatever is asked while the model is at work joins its batch, so ask many at once: that is where the speed comes
from. Answers are greedy, or, where the request has a temperature, drawn with a key that follows from the request. So
the same model gives the same answer to the same request, but for the last bits of a sum, which depend on what else is
in the batch and may, rarely, tip an answer another way. The token limit has no part in the key: an answer that was cut
and is asked again with more tokens goes on as it began, so that long answers are not drawn anew until one is short.

MLX is used in one thread, which lives as long as the teacher; the model is loaded there by the first request. Not
done here: top-p and the like, tools, and taking a reasoning model's thoughts out of its answers.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from mlx_distill.errors import InputError, MlxDistillError, TeacherError, TeacherUnavailableError
from mlx_distill.layout import file_sha256
from mlx_distill.manifest import TeacherTerms
from mlx_distill.models.resolve import resolve
from mlx_distill.records import Message, ModelRecord, Reply, Request, Usage, content_hash

if TYPE_CHECKING:
    from mlx_distill.backends.mlx.engine import Completion, Engine
    from mlx_distill.backends.mlx.thread import MlxThread

T = TypeVar("T")

#: Answers written at once, as mlx-lm's own server does. Fewer are under way where fewer are asked at once.
BATCH_SIZE = 32

#: Licences, as model cards spell them, that put no condition on what is trained on a model's answers.
FREE_LICENCES = frozenset(
    {"apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "cc0-1.0", "unlicense", "cc-by-4.0"}
)

#: Seconds that the model works before it looks for new requests, and for those taken back.
_ROUND_SECONDS = 0.05

_REVISION_CHARACTERS = 12

#: Files of a model's folder that decide its answers beside the weights.
_DECIDING = ("*.json", "*.jinja", "tokenizer.model", "merges.txt")


@dataclass(frozen=True, eq=False)
class _Question:
    key: int
    request: Request
    answer: asyncio.Future[Completion]


class MlxTeacher:
    """A model on this machine.

    Args:
        model: A folder, a Hub id, a .gguf file or a bundled model's name. Found, and fetched if need be, at once;
            loaded by the first request.
        batch_size: Answers written at once.

    Attributes:
        revision: Commit of the Hub, or hash of the file or of the folder.

    Raises:
        ModelError: It cannot be found, or is not a whole model.
    """

    def __init__(self, model: str, *, batch_size: int = BATCH_SIZE) -> None:
        self.spec = f"mlx:{model}"
        self._record = resolve(model)
        self.revision = _revision(self._record)[:_REVISION_CHARACTERS]
        self._batch_size = batch_size
        self._thread: MlxThread | None = None
        self._engine: Engine | None = None
        self._keys = itertools.count()
        self._asked: list[_Question] = []
        #: Keys that a driver left in the engine when its event loop ended.
        self._abandoned: list[int] = []
        self._driver: asyncio.Task[None] | None = None
        self._closed = False

    def terms(self) -> TeacherTerms:
        """The model's own licence decides."""
        return _terms(self.spec, self._record)

    async def ask(self, request: Request) -> Reply:
        """Ask one request. An answer that the model's context cuts short has the stop "context".

        Raises:
            TeacherUnavailableError: The model does not load.
            TeacherError: The prompt does not fit into the model's context or its chat template, or generating failed.
        """
        if self._closed:
            raise TeacherError(f"{self.spec} is closed.")
        start = time.monotonic()
        question = _Question(next(self._keys), request, asyncio.get_running_loop().create_future())
        self._asked.append(question)
        if self._driver is None or self._driver.done():
            self._driver = asyncio.create_task(self._drive())
        completion = await question.answer
        return Reply(
            text=completion.text,
            stop=completion.stop,
            stop_reason=completion.stop,
            usage=Usage(input_tokens=completion.prompt_tokens, output_tokens=completion.tokens),
            model=self._record.name,
            seconds=time.monotonic() - start,
        )

    async def close(self) -> None:
        """Stop, let go of the model, and end its thread. What is still being asked fails."""
        if self._closed:
            return
        self._closed = True
        if self._driver is not None:
            self._driver.cancel()
            await asyncio.gather(self._driver, return_exceptions=True)
        if self._thread is not None:
            # Behind a round that may still be running.
            await self._in_thread(self._unload)
            self._thread.close()

    async def _drive(self) -> None:
        """Let the engine work round by round while anyone waits for an answer."""
        open_: dict[int, _Question] = {}
        try:
            while self._asked or open_:
                gone = [key for key, question in open_.items() if question.answer.cancelled()]
                new = [question for question in self._asked if not question.answer.cancelled()]
                self._asked.clear()
                open_.update((question.key, question) for question in new)
                try:
                    outcomes = await self._in_thread(partial(self._round, new, [*self._abandoned, *gone]))
                except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must hear of it
                    outcomes = [(key, self._failure(error)) for key in open_]
                    await self._in_thread(self._unload)
                self._abandoned.clear()
                for key in gone:
                    del open_[key]
                for key, outcome in outcomes:
                    if key in open_:
                        _settle(open_.pop(key).answer, outcome)
        finally:
            # Cancelled, by close or by the end of the event loop: nobody may be left waiting.
            for question in (*open_.values(), *self._asked):
                _settle(question.answer, TeacherError(f"{self.spec} was closed before it had answered."))
            self._asked.clear()
            self._abandoned.extend(open_)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        if self._thread is None:
            from mlx_distill.backends.mlx.thread import MlxThread

            self._thread = MlxThread("mlx-teacher")
        return await asyncio.wrap_future(self._thread.submit(call))

    def _round(
        self, new: Sequence[_Question], taken_back: Sequence[int]
    ) -> list[tuple[int, Completion | MlxDistillError]]:
        """In the thread of the model: take what is new, drop what is not wanted, and write for a while."""
        from mlx_distill.backends.mlx.drawing import Sampling

        engine = self._loaded()
        engine.remove(taken_back)
        refused: list[tuple[int, Completion | MlxDistillError]] = []
        for question in new:
            request = question.request
            sampling = Sampling.of(request.temperature or 0.0, request.draw_key)
            try:
                engine.add(question.key, _conversation(request), max_tokens=request.max_tokens, sampling=sampling)
            except InputError as error:
                refused.append((question.key, TeacherError(f"{self.spec}: {error.message}", hint=error.hint)))
        # Those refused are told at once.
        return [*refused, *engine.advance(0.0 if refused else _ROUND_SECONDS)]

    def _loaded(self) -> Engine:
        if self._engine is None:
            from mlx_distill.backends.mlx.engine import Engine

            try:
                self._engine = Engine(Path(self._record.path), batch_size=self._batch_size)
            except MlxDistillError as error:
                raise TeacherUnavailableError(error.message, hint=error.hint) from error
        return self._engine

    def _unload(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def _failure(self, error: Exception) -> TeacherError:
        """A new one for everyone who waits, as each raises its own."""
        failure: TeacherError
        if isinstance(error, TeacherError):
            failure = type(error)(error.message, hint=error.hint)
        else:
            reason = " ".join(str(error).split())
            failure = TeacherError(
                f"{self.spec} failed as it generated: {type(error).__name__}{': ' if reason else ''}{reason}.",
                hint="If memory ran out, lower --concurrency or --max-tokens. The same command asks again.",
            )
        failure.__cause__ = error
        return failure


def _settle(answer: asyncio.Future[Completion], outcome: Completion | MlxDistillError) -> None:
    if answer.done():
        return
    if isinstance(outcome, MlxDistillError):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


def _conversation(request: Request) -> list[Message]:
    system = [] if request.system is None else [Message(role="system", content=request.system)]
    return [*system, *request.messages]


def _revision(record: ModelRecord) -> str:
    """The record's own, which tells the weights; of a folder, which anyone can edit, also tokenizer and template."""
    if record.source != "folder":
        return record.revision or ""
    folder = Path(record.path)
    files = {path.name: path for pattern in _DECIDING for path in folder.glob(pattern) if path.is_file()}
    hashes = {name: file_sha256(path) for name, path in sorted(files.items())}
    return content_hash({"weights": record.revision, "files": hashes})


def _terms(spec: str, record: ModelRecord) -> TeacherTerms:
    licence = record.licence
    url = f"https://huggingface.co/{record.spec.partition('@')[0]}" if record.source == "hub" else None
    if licence is None:
        return TeacherTerms(
            teacher=spec,
            licence="unknown",
            summary="The model's files state no licence. Find it, and whether it lets you train on the answers.",
            url=url,
        )
    if licence.lower() in FREE_LICENCES:
        return TeacherTerms(
            teacher=spec, licence=licence, summary=f"{licence}: training on the answers is free.", url=url
        )
    return TeacherTerms(
        teacher=spec,
        licence=licence,
        summary=f"The model's licence is {licence}. Read there whether, and how, you may train on its answers.",
        url=url,
    )
