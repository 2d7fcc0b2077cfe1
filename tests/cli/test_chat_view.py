"""Text of a model in a terminal: shown, never obeyed."""

from __future__ import annotations

import pytest

from mlx_distill.cli.chat_view import visible

#: What a terminal would obey: a title, a bell, the start of the line, a C1 sequence that clears, reversed text, a step
#: back; then a letter of two columns. No byte is there twice.
HOSTILE = "\x1b]0;pwn\x07\r\x9b2J\u202eX\x08界"
ESCAPED = r"\x1b]0;pwn\x07\r\x9b2J\u202eX\x08界"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HOSTILE, ESCAPED),
        ("a\tb\nc d é 界 👩\u200d💻 می\u200cخواهم", "a\tb\nc d é 界 👩\u200d💻 می\u200cخواهم"),
        ("\0\x7f\x85\u2028\u2066\ufeff\ud800\xad", r"\x00\x7f\x85\u2028\u2066\ufeff\ud800\xad"),
        ("no\xa0break\u3000wide", "no\xa0break\u3000wide"),
    ],
)
def test_text_is_shown_as_it_is_where_that_is_harmless(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_no_character_but_three_commands() -> None:
    every = "".join(map(chr, range(0x110000)))
    shown = visible(every)
    assert {letter for letter in shown if ord(letter) < 32 or 127 <= ord(letter) < 160} == {"\n", "\t"}
    assert visible(shown) == shown
