"""`mlx-distill chat` as it is used: piped into, and at a terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from mlx_distill.cli.chat_view import visible
from mlx_distill.cli.main import main
from mlx_distill.rows import read_rows
from mlx_distill.training.run import train
from tests.children import ROOT, read_to_end
from tests.cli.test_chat_view import ESCAPED, HOSTILE
from tests.tiny import make_tiny_model
from tests.training.runs import environment, make_data, settings

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A finished run whose student says something else than the base, and neither ends by itself."""
    folder = tmp_path_factory.mktemp("talked")
    train(settings(make_data(folder / "data"), tiny_model, folder / "tuned", epochs=3, learning_rate=0.02))
    return folder / "tuned"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose base and student say HOSTILE to everything, and end."""
    folder = tmp_path_factory.mktemp("hostile")
    model = make_tiny_model(folder / "model", tied=False)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ((letters, _),) = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("\n" + HOSTILE)
    chain = [*map(tokenizer.token_to_id, letters), tokenizer.token_to_id("<|im_end|>")]
    assert len({*chain}) == len(chain)
    weights = load_file(model / "model.safetensors")
    for name, value in weights.items():
        # Without attention and inner layer only the last token counts; the head names the one that follows it.
        if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
            value[:] = 0
        elif "norm" in name:
            value[:] = 1
    embeddings = weights["model.embed_tokens.weight"]
    for token, follows in pairwise(chain):
        weights["lm_head.weight"][follows] = embeddings[token] / (embeddings[token] ** 2).sum() ** 0.5
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    train(settings(make_data(folder / "data"), model, folder / "run", epochs=1, learning_rate=1e-12))
    return folder / "run"


def invoke(*arguments: str | Path, lines: str | bytes) -> Result:
    return CliRunner().invoke(main, ["chat", *map(str, arguments)], input=lines)


# Piped.


def test_json_is_one_object_with_every_turn(run: Path) -> None:
    lines = "add\n\n/only base\nfor item in items\n//slash\n/reset\n/system Be short.\nadd\n"
    result = invoke(run, "--max-tokens", "6", "--json", lines=lines)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("\n") == 1
    found = json.loads(result.stdout)
    assert found["models"] == {"base": "model", "distilled": "tuned"}
    assert (found["max_tokens"], found["temperature"], found["seed"]) == (6, 0.0, 0)
    turns = found["turns"]
    assert [(turn["conversation"], turn["prompt"], turn["system"], list(turn["answers"])) for turn in turns] == [
        (0, "add", None, ["base", "distilled"]),
        (0, "for item in items", None, ["base"]),
        (0, "/slash", None, ["base"]),
        (1, "add", "Be short.", ["base"]),
    ]
    first = turns[0]["answers"]
    assert first["base"]["text"] != first["distilled"]["text"]
    assert first["base"]["tokens"] == 6
    assert first["base"]["stop"] == "length"
    assert first["base"]["seconds"] > 0
    assert turns[1]["answers"]["base"]["remembered_tokens"] >= first["base"]["prompt_tokens"]


def test_plain_text_is_the_conversation_alone(run: Path) -> None:
    lines = "add\nfor item in items\n/help\n"
    plain = invoke(run, "--max-tokens", "6", lines=lines)
    turns = json.loads(invoke(run, "--max-tokens", "6", "--json", lines=lines).stdout)["turns"]
    names = {"base": "base (model)", "distilled": "distilled (tuned)"}
    assert plain.exit_code == 0
    assert plain.stdout == "".join(
        f"> {turn['prompt']}\n\n"
        + "".join(f"{names[who]}:\n{visible(answer['text'])}\n\n" for who, answer in turn["answers"].items())
        for turn in turns
    )
    assert "base: 6 tokens, " in plain.stderr
    assert "/reset" in plain.stderr


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_every_line_end_and_a_byte_order_mark_are_understood(run: Path, ending: str) -> None:
    result = invoke(run, "--max-tokens", "1", "--json", lines=("\ufeffadd" + ending + "é" + ending + "last").encode())
    assert [turn["prompt"] for turn in json.loads(result.stdout)["turns"]] == ["add", "é", "last"]


def test_nothing_piped_in_is_no_turn(run: Path) -> None:
    result = invoke(run, "--json", lines="")
    assert (result.exit_code, json.loads(result.stdout)["turns"]) == (0, [])


def test_quit_leaves_the_rest_unread(run: Path) -> None:
    result = invoke(run, "--max-tokens", "1", "--json", lines="add\n/quit\nmore\n")
    assert [turn["prompt"] for turn in json.loads(result.stdout)["turns"]] == ["add"]


def test_what_comes_to_nothing_is_told_and_the_rest_is_done(run: Path) -> None:
    lines = b"/rset\n\xff\n" + b"x " * 3000 + b"\nadd\n"
    result = invoke(run, "--max-tokens", "2", "--json", lines=lines)
    assert result.exit_code == 1
    assert "did you mean /reset?" in result.stderr
    assert "standard input:2: not UTF-8" in result.stderr
    assert "/reset forgets what was said" in result.stderr
    turns = json.loads(result.stdout)["turns"]
    assert [bool(turn["answers"]) for turn in turns] == [False, True]
    assert "leaves no room" in turns[0]["problem"]
    assert "Traceback" not in result.output


def test_the_same_seed_says_the_same(run: Path) -> None:
    def drawn(seed: int) -> list[str]:
        arguments = ("--max-tokens", "20", "--temperature", "1.5", "--seed", str(seed), "--json")
        turns = json.loads(invoke(run, *arguments, lines="add\nadd\n").stdout)["turns"]
        return [turn["answers"]["base"]["text"] for turn in turns]

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_run_that_is_none_is_an_error(tmp_path: Path) -> None:
    result = invoke(tmp_path / "none", lines="add\n")
    assert result.exit_code == 1
    assert "mlx-distill train" in result.stderr
    assert result.stdout == ""


def test_a_conversation_can_be_saved_by_script(run: Path, tmp_path: Path) -> None:
    result = invoke(run, "--max-tokens", "3", lines=f"add\n/save {tmp_path}/t.jsonl\n/save {tmp_path}/t.jsonl\n")
    assert result.exit_code == 1
    assert "/save replaces nothing" in result.stderr
    assert len(list(read_rows(tmp_path / "t.jsonl"))) == 2


# Hostile answers.


def test_what_a_model_says_never_commands_a_terminal(hostile: Path) -> None:
    turn = json.loads(invoke(hostile, "--json", lines="add\n").stdout)["turns"][0]
    assert {answer["text"] for answer in turn["answers"].values()} == {HOSTILE}
    assert {answer["stop"] for answer in turn["answers"].values()} == {"end"}
    plain = invoke(hostile, lines="add\n").stdout
    assert plain.count(f":\n{ESCAPED}\n\n") == 2


def test_what_is_typed_is_shown_as_harmlessly(run: Path) -> None:
    result = invoke(run, "--max-tokens", "1", lines="a\x1b[2Jdd\n/\x1b]0;x\x07\n")
    assert "\x1b" not in result.output
    assert r"> a\x1b[2Jdd" in result.stdout
    assert r"There is no /\x1b]0;x\x07" in result.stderr


# At a terminal.

#: Makes the terminal on its standard input its own, so that Ctrl-C there is an interrupt, and becomes the command.
_TAKING_IT = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.executable, sys.argv[1:])"
)


class Terminal:
    """A terminal with `mlx-distill chat` in it.

    Args:
        arguments: Of the command.
        columns: Of the terminal.
        rows: Of the terminal.
        stdout: Where standard output goes; None for the terminal.
    """

    def __init__(self, *arguments: str | Path, columns: int = 120, rows: int = 30, stdout: int | None = None) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        variables = {key: value for key, value in environment().items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
        command = [sys.executable, "-m", "mlx_distill", "chat", *map(str, arguments)]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _TAKING_IT, *command],
            stdin=theirs,
            stdout=theirs if stdout is None else stdout,
            stderr=theirs,
            start_new_session=True,
            env={**variables, "TERM": "xterm-256color", "PYTHONUTF8": "1", "INPUTRC": "/dev/null"},
            cwd=ROOT,
        )
        os.close(theirs)
        self._open = True
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """Read until what was written since the last call, without styles, has the pattern; returns it so far."""
        end = time.monotonic() + seconds
        raw = b""
        while not re.search(pattern, plain(raw.decode(errors="replace")), re.DOTALL):
            ready, _, _ = select.select([self._ours], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {pattern!r} in {raw!r}"
            try:
                block = os.read(self._ours, 65536)
            except OSError:
                block = b""
            assert block, f"it ended without {pattern!r}: {raw!r}"
            raw += block
        self.seen = raw.decode(errors="replace")
        return plain(self.seen)

    def end(self) -> int:
        """Read to the end; returns the exit code."""
        self._open = False
        self.seen = read_to_end(self._ours).decode(errors="replace")
        return self.process.wait(timeout=60)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        if self._open:
            os.close(self._ours)


def plain(text: str) -> str:
    """Text without what styles it and moves the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text).replace("\r", "")


@pytest.fixture
def terminal() -> Iterator[Callable[..., Terminal]]:
    opened: list[Terminal] = []

    def open_terminal(*arguments: str | Path, **options: int) -> Terminal:
        opened.append(Terminal(*arguments, **options))
        return opened[-1]

    yield open_terminal
    for one in opened:
        one.close()


def test_two_columns_are_drawn_and_ctrl_c_stops_an_answer_alone(
    terminal: Callable[..., Terminal], run: Path, tmp_path: Path
) -> None:
    screen = terminal(run, "--max-tokens", "1900")
    screen.wait_for(r"base \(model\)   distilled \(tuned\)\n.*/help.*> $")
    screen.type("add\n")
    # The names stand side by side, and below them both answers grow.
    screen.wait_for(r"base \(model\) +│ distilled \(tuned\)\n\S.* │ .*\S")
    screen.type("\x03")
    told = screen.wait_for(r"stopped   distilled: \d+ tokens?, [\d.]+ tokens/s, stopped\n> $")
    assert "^C" not in told
    # The cursor, hidden while answers are drawn, is there again.
    assert "\x1b[?25h" in screen.seen
    assert "\x1b[?25l" not in screen.seen.rpartition("\x1b[?25h")[2]
    screen.type(f"/save {tmp_path}/talk.jsonl\n")
    screen.wait_for(r"Saved 2 conversations.*> $")
    screen.type("/only base\n")
    screen.wait_for(r"base will answer\.\n> $")
    screen.type("more\n")
    screen.wait_for(r"base \(model\):\n.*\S")
    screen.type("\x03")
    screen.wait_for(r"stopped\n> $")
    screen.type("\x04")
    assert screen.end() == 0
    assert len(list(read_rows(tmp_path / "talk.jsonl"))) == 2


def test_ctrl_c_where_nothing_is_written_ends_it(terminal: Callable[..., Terminal], run: Path) -> None:
    screen = terminal(run, "--max-tokens", "3")
    screen.wait_for(r"> $")
    screen.type("add\n")
    screen.wait_for(r"cut at --max-tokens\n> $")
    screen.type("\x03")
    assert screen.end() == 0
    assert "Traceback" not in screen.seen


def test_a_narrow_terminal_shows_one_after_the_other(terminal: Callable[..., Terminal], run: Path) -> None:
    screen = terminal(run, "--max-tokens", "8", columns=79)
    screen.wait_for(r"> $")
    screen.type("add\n")
    told = screen.wait_for(r"cut at --max-tokens\n> $")
    assert re.search(r"\nbase \(model\):\n.*\n\ndistilled \(tuned\):\n", told, re.DOTALL)
    assert " │ " not in told
    screen.type("/quit\n")
    assert screen.end() == 0


@pytest.mark.parametrize("columns", [79, 120])
def test_a_hostile_answer_stays_text(terminal: Callable[..., Terminal], hostile: Path, columns: int) -> None:
    screen = terminal(hostile, columns=columns)
    screen.wait_for(r"> $")
    screen.type("add\n")
    told = screen.wait_for(r"ended\n> $")
    assert "".join(told.split()).count("".join(ESCAPED.split())) >= 2
    for command in ("\x1b]", "\x07", "\x9b", "\u202e", "\x08", "\x1b[2J"):
        assert command not in screen.seen.replace("\x1b[?2004", "")


def test_a_long_answer_stands_whole_in_the_terminal(terminal: Callable[..., Terminal], run: Path) -> None:
    """While it is written its end alone is seen; then all of it is there, once."""
    screen = terminal(run, "--max-tokens", "160", columns=80, rows=8)
    screen.wait_for(r"> $")
    screen.type("add\n")
    told = screen.wait_for(r"distilled: \d+ tokens, [^\n]*\n> $")
    answer = json.loads(invoke(run, "--max-tokens", "160", "--json", lines="add\n").stdout)["turns"][0]["answers"][
        "base"
    ]
    last = told[told.rindex("base (model)") :]
    column = [line.split(" │ ")[0] for line in last.splitlines()[1:]]
    assert "".join("".join(column).split()).startswith("".join(visible(answer["text"]).split()))
    assert len(column) > 8


def test_a_line_that_ends_in_a_backslash_goes_on(terminal: Callable[..., Terminal], run: Path, tmp_path: Path) -> None:
    screen = terminal(run, "--max-tokens", "2")
    screen.wait_for(r"> $")
    screen.type("first\\\n")
    screen.wait_for(r"\. $")
    screen.type("second\n")
    screen.wait_for(r"tokens/s, [^\n]*\n> $")
    screen.type(f"/save {tmp_path}/t.jsonl\n")
    screen.wait_for(r"Saved")
    row = next(read_rows(tmp_path / "t.jsonl"))
    assert row.chat is not None
    assert row.chat.messages[0].content == "first\nsecond"


def test_json_leaves_standard_output_to_the_object(
    terminal: Callable[..., Terminal], run: Path, tmp_path: Path
) -> None:
    with (tmp_path / "out.json").open("wb") as file:
        screen = terminal(run, "--max-tokens", "2", "--json", stdout=file.fileno())
        screen.wait_for(r"> $")
        screen.type("add\n")
        screen.wait_for(r"--max-tokens\n> $")
        screen.type("\x04")
        assert screen.end() == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [turn["prompt"] for turn in found["turns"]] == ["add"]


def test_sigterm_is_an_interruption(terminal: Callable[..., Terminal], run: Path) -> None:
    screen = terminal(run)
    screen.wait_for(r"> $")
    screen.process.terminate()
    assert screen.end() == 130
    assert "Of a conversation nothing is kept but what /save wrote." in screen.seen
