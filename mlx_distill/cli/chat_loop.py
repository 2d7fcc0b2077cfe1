"""Holds a conversation: reads what is typed or piped in, puts it to the session, and shows what comes of it."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Iterator, Mapping
from types import FrameType

from mlx_distill.chat.commands import as_prompt, is_command, obey
from mlx_distill.chat.session import Answer, Ending, Session
from mlx_distill.cli.chat_view import Paper, choose_view, visible
from mlx_distill.errors import InputError, MlxDistillError
from mlx_distill.records import Contender

_ENDINGS: Mapping[Ending, str] = {
    "end": "ended",
    "length": "cut at --max-tokens",
    "context": "cut, as the context is full: /reset",
    "stopped": "stopped",
}


class Talk:
    """A conversation with whoever types, at a terminal, or with the lines of standard input.

    Args:
        session: Who answers.
        models: Names of the models, by contender.
        paper: Where the answers go.
        remarks: Where all else goes; that it is the same shows a terminal, where somebody types.
        quiet: Show no answers where nobody types.

    Attributes:
        failed: Whether a line of standard input came to nothing. Whoever types has seen it.
    """

    def __init__(
        self, session: Session, models: Mapping[Contender, str], paper: Paper, remarks: Paper, *, quiet: bool = False
    ) -> None:
        self._session = session
        self._names = {contender: f"{contender} ({visible(model)})" for contender, model in models.items()}
        self._typed = paper.on_terminal and sys.stdin is not None and sys.stdin.isatty()
        self._paper, self._remarks = paper, paper if self._typed else remarks
        self._shows = self._typed or not quiet
        self._answering = False
        self.failed = False

    def hold(self) -> None:
        """Talk until it is ended, or standard input is."""
        if not self._typed:
            for line in _piped_lines():
                if not self._take(line):
                    return
            return
        with self._interruptible():
            self._remark("   ".join(self._names.values()))
            self._remark("/help shows what can be typed. Ctrl-C stops an answer; Ctrl-D ends.")
            try:
                while self._take(self._typed_line()):
                    pass
            except EOFError:
                # What was to be typed into is left.
                self._remarks.write("\n")

    def _take(self, line: str | InputError) -> bool:
        """Do what a line says. Returns whether the conversation goes on."""
        try:
            if isinstance(line, InputError):
                raise line
            if is_command(line):
                obeyed = obey(self._session, line)
                for told in obeyed.lines:
                    self._remark(told)
                return not obeyed.quits
            if line.strip():
                self._ask(as_prompt(line))
        except MlxDistillError as error:
            self.failed = not self._typed
            self._remark(str(error))
        return True

    def _ask(self, prompt: str) -> None:
        view = choose_view(self._paper, {who: self._names[who] for who in self._session.asked})
        events = self._session.ask(prompt, together=self._shows and view.together)
        if self._shows and not self._typed:
            self._paper.write(f"> {visible(prompt)}\n\n", bold=True)
        self._answering = True
        try:
            with _unechoed() if self._typed else contextlib.nullcontext():
                if self._shows:
                    view.show(events)
                else:
                    for _ in events:
                        pass
        finally:
            self._answering = False
            if answers := self._session.turns[-1].answers:
                self._remark("   ".join(map(_told, answers)))

    def _remark(self, text: str) -> None:
        for line in text.split("\n"):
            self._remarks.write(visible(line), dim=True)
            self._remarks.write("\n")

    def _typed_line(self) -> str | InputError:
        """What is typed, up to a line that does not end in a backslash.

        Raises:
            EOFError: The conversation is to end.
        """
        try:
            lines = [self._typed_row("> ")]
            while lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
                lines.append(self._typed_row(". "))
        except UnicodeDecodeError as error:
            return InputError(f"What was typed is not {error.encoding.upper()}: {error.reason}.")
        return "\n".join(lines)

    def _typed_row(self, mark: str) -> str:
        if self._paper.file is sys.stdout:
            return input(mark)
        # As input() would write its mark to standard output, which is for the result.
        self._paper.write(mark)
        return input()

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """Make Ctrl-C stop answers where some are written, and end the conversation elsewhere."""

        def interrupt(_signal: int, _frame: FrameType | None) -> None:
            if not self._answering:
                raise EOFError
            self._session.stop()

        with contextlib.suppress(ImportError):
            # Line editing, and what was typed before by the arrow keys; it is kept nowhere.
            import readline  # noqa: F401

        previous = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def _told(answer: Answer) -> str:
    count = f"{answer.tokens} token{'' if answer.tokens == 1 else 's'}"
    return f"{answer.contender}: {count}, {answer.tokens_per_second:.1f} tokens/s, {_ENDINGS[answer.stop]}"


def _piped_lines() -> Iterator[str | InputError]:
    """The lines of standard input; one that is no text as the error that it is."""
    if sys.stdin is None:
        return
    for number, line in enumerate(sys.stdin.buffer, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            yield InputError(f"not UTF-8: {error.reason}.", path="standard input", line=number)


@contextlib.contextmanager
def _unechoed() -> Iterator[None]:
    """Keep a terminal from showing what is typed while answers are drawn. It is read afterwards."""
    try:
        import termios

        terminal = sys.stdin.fileno()
        before = termios.tcgetattr(terminal)
    except (ImportError, io.UnsupportedOperation, termios.error):
        yield
        return
    silent = [*before]
    silent[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSANOW, silent)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
