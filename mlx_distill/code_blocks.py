"""Finds the fenced code blocks of a Markdown answer.

The blocks are those that CommonMark sees, through markdown-it-py: longer fences hold shorter ones, tildes and
backticks do not close each other, and fences in lists and quotations lose that indentation. Two things are more
generous than CommonMark, since models indent carelessly: a fence may be indented by any amount, and text inside
HTML is read like any other. Time is linear in the length of the answer.

Not seen as code: blocks that are only indented, and code in single backticks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

from markdown_it import MarkdownIt

#: What a fence may say → the name used here.
_ALIASES = {
    "py": "python",
    "python3": "python",
    "sqlite": "sql",
    "sqlite3": "sql",
    "postgresql": "sql",
    "postgres": "sql",
    "mysql": "sql",
    "kt": "kotlin",
    "kts": "kotlin",
    "md": "markdown",
}

_NEWLINE = re.compile(r"\r\n|\r")
_LANGUAGE = re.compile(r"[\w+#.-]+")


@dataclass(frozen=True)
class CodeBlock:
    """One fenced block.

    Attributes:
        language: First word of the info string in lower case, aliases resolved; "" where the fence names none.
        text: The code, with `\\n` at the end of each line.
        closed: Whether a closing fence follows.
        start: Line of the opening fence, counted from 0.
        end: Line after the block.
    """

    language: str
    text: str
    closed: bool
    start: int
    end: int


@cache
def _parser() -> MarkdownIt:
    unneeded = ["code", "html_block", "reference", "hr", "lheading", "inline"]
    return MarkdownIt("commonmark").disable(unneeded)


def code_blocks(answer: str) -> list[CodeBlock]:
    """All fenced blocks of an answer, in order. A fence inside another block is part of that block's text."""
    return [
        _block(token.info, token.content, *token.map)
        for token in _parser().parse(answer)
        if token.type == "fence" and token.map is not None
    ]


def _block(info: str, content: str, start: int, end: int) -> CodeBlock:
    text = content if content.endswith("\n") or not content else content + "\n"
    # The lines of a block are its opening fence, its text and, if there is one, its closing fence.
    closed = end - start == text.count("\n") + 2
    return CodeBlock(_language(info), text, closed, start, end)


def _language(info: str) -> str:
    match = _LANGUAGE.search(info)
    name = match.group().lower().strip(".") if match else ""
    return _ALIASES.get(name, name)


def lines_of(answer: str) -> list[str]:
    """The lines of an answer as `CodeBlock.start` and `.end` count them."""
    return _NEWLINE.sub("\n", answer).split("\n")


def prose(answer: str, blocks: Sequence[CodeBlock]) -> str:
    """The answer without its code blocks, each of which leaves an empty line."""
    lines = lines_of(answer)
    kept: list[str] = []
    at = 0
    for block in blocks:
        kept += [*lines[at : block.start], ""]
        at = block.end
    return "\n".join([*kept, *lines[at:]])


def source(blocks: Iterable[CodeBlock], language: str) -> str:
    """The blocks of one language, joined in order as one script; "" where there are none.

    An unlabelled block belongs to no language, nor does a Python block that records a console session (`>>> `).
    """
    return "\n".join(
        block.text for block in blocks if block.language == language and not block.text.lstrip().startswith(">>> ")
    )
