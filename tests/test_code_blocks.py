"""Fenced blocks are found as CommonMark finds them, whatever the answer does."""

from __future__ import annotations

import gc
import time

import pytest

from mlx_distill.code_blocks import code_blocks, prose, source


def seen(answer: str) -> list[tuple[str, str, bool]]:
    return [(block.language, block.text, block.closed) for block in code_blocks(answer)]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("```python\nx = 1\n```\n", [("python", "x = 1\n", True)]),
        ("```python\nx = 1\n```", [("python", "x = 1\n", True)]),
        ("a\n```\nx\n```\nb\n~~~sql\nSELECT 1;\n~~~\n", [("", "x\n", True), ("sql", "SELECT 1;\n", True)]),
        ("```python\n```\n", [("python", "", True)]),
        ("```\n\n```\n", [("", "\n", True)]),
    ],
)
def test_plain_blocks(answer: str, expected: list[tuple[str, str, bool]]) -> None:
    assert seen(answer) == expected


@pytest.mark.parametrize(
    "answer",
    [
        "```python\nx = 1",
        "```python\nx = 1\n",
        "```python\nx = 1\n~~~\n",
        "```python\nx = 1\n``\n",
        "````python\n```\n",
    ],
)
def test_an_unclosed_fence_is_told(answer: str) -> None:
    [block] = code_blocks(answer)
    assert not block.closed
    assert block.language == "python"


def test_an_unclosed_fence_keeps_its_trailing_blank_lines_and_stays_unclosed() -> None:
    assert seen("```python\nx\n\n\n") == [("python", "x\n\n\n", False)]
    assert seen("```python") == [("python", "", False)]


def test_a_longer_fence_holds_shorter_ones() -> None:
    inner = "```python\nx = 1\n```\n"
    assert seen(f"````markdown\n{inner}````\n") == [("markdown", inner, True)]
    assert seen(f"~~~md\n{inner}~~~\n") == [("markdown", inner, True)]


def test_fences_in_lists_and_quotations_lose_their_indentation() -> None:
    listed = "1. Do this:\n\n   ```python\n   if x:\n       y()\n   ```\n2. Then that.\n"
    assert seen(listed) == [("python", "if x:\n    y()\n", True)]
    quoted = "> ```python\n> if x:\n>     y()\n> ```\nafter"
    assert seen(quoted) == [("python", "if x:\n    y()\n", True)]


def test_carelessly_deep_indentation_is_still_a_fence() -> None:
    assert seen("        ```python\n        x = 1\n        ```\n") == [("python", "x = 1\n", True)]


def test_windows_and_old_mac_line_ends() -> None:
    answer = "a\r\n```python\r\nx = 1\r\ny = 2\r\n```\r\nb"
    blocks = code_blocks(answer)
    assert seen(answer) == [("python", "x = 1\ny = 2\n", True)]
    assert prose(answer, blocks) == "a\n\nb"
    assert seen("a\r```sql\rSELECT 1\r```\r") == [("sql", "SELECT 1\n", True)]


def test_inline_backticks_open_nothing() -> None:
    assert seen("Use ```x``` here, or `y`.\n\n``` a`b\ntext\n") == []


@pytest.mark.parametrize(
    ("info", "language"),
    [("Python3", "python"), ("py", "python"), ("{.python .numberLines}", "python"), ("python title=a.py", "python"),
     ("c++", "c++"), ("SQLite", "sql"), ("kt", "kotlin"), ("", "")],
)  # fmt: skip
def test_languages(info: str, language: str) -> None:
    assert code_blocks(f"```{info}\nx\n```\n")[0].language == language


def test_source_joins_one_language_in_order_and_leaves_console_sessions_out() -> None:
    answer = "```python\na = 1\n```\n```sql\nSELECT 1;\n```\n```py\nb = 2\n```\n```python\n>>> a\n1\n```\n```\nc\n```\n"
    assert source(code_blocks(answer), "python") == "a = 1\n\nb = 2\n"
    assert source(code_blocks(answer), "sql") == "SELECT 1;\n"
    assert source(code_blocks(answer), "java") == ""


def test_prose_and_blocks_share_the_lines_out() -> None:
    answer = "one\n```\ncode\n```\ntwo\n~~~\nopen"
    blocks = code_blocks(answer)
    assert [(block.start, block.end) for block in blocks] == [(1, 4), (5, 7)]
    assert prose(answer, blocks) == "one\n\ntwo\n"


@pytest.mark.parametrize(
    "piece",
    [
        "```python\nx = 1\n```\n\n", "```\n", "```a b`\n", "> ", "- ", "`", "~~~\n```\n", "- a\n", "word ",
        "*a **b [c](", "\n", "\0", "1. ```\n", "> > > ```\n", "<div>\n",
    ],
)  # fmt: skip
def test_time_is_linear_in_a_hostile_answer(piece: str) -> None:
    def seconds(characters: int) -> float:
        answer = piece * (characters // len(piece))
        # The processor's time, not the clock's, and the least of three: what else runs beside it is no part of it. Nor
        # is collecting garbage, which looks at all that the tests before have left in memory.
        gc.collect()
        gc.disable()
        try:
            found = []
            for _ in range(3):
                start = time.process_time()
                code_blocks(answer)
                found.append(time.process_time() - start)
            return min(found)
        finally:
            gc.enable()

    seconds(1000)
    # Four times the length: sixteen times the time if it were quadratic. The constant absorbs a busy machine.
    assert seconds(120_000) < 8 * seconds(30_000) + 0.5


def test_an_answer_of_a_hundred_thousand_tokens() -> None:
    answer = "Text.\n\n" + "```python\n" + "value = compute(value)\n" * 18_000
    start = time.perf_counter()
    [block] = code_blocks(answer)
    assert time.perf_counter() - start < 5
    assert block.text.count("\n") == 18_000
    assert not block.closed
