"""Answers as HTML: whatever they hold, nothing of it becomes markup of its own."""

from __future__ import annotations

import time
from html.parser import HTMLParser

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_distill.report.prose import MOST_CHARACTERS, render_answer, render_code
from mlx_distill.report.wording import code_cell, plain_cell, visible

_TAG_NAMES = "p pre code span em strong s ul ol li blockquote hr br table thead tbody tr th td h5 h6"
TAGS = set(_TAG_NAMES.split())
ATTRIBUTES = {("pre", "tabindex"), ("pre", "data-language"), ("span", "class"), ("ol", "start"), ("p", "class")} | {
    (tag, "class") for tag in ("th", "td")
}
VOID = {"hr", "br"}


class Strict(HTMLParser):
    """Refuses every tag and attribute that is not ours, and every one that is not closed."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        assert tag in TAGS, tag
        for name, _ in attrs:
            assert (tag, name) in ATTRIBUTES, (tag, name)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID, tag

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def handle_comment(self, data):
        raise AssertionError("a comment")

    handle_decl = handle_pi = unknown_decl = handle_comment


def text_of(html: str) -> str:
    parser = Strict()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser.text


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "text <b onclick='alert(1)'>bold</b>",
    "</div></main><h1>Owned</h1>",
    "<!-- <!DOCTYPE x> <?php ?> <![CDATA[ ]]>",
    "[click](javascript:alert(1)) ![pixel](https://example.org/p.png)",
    "<https://example.org> https://example.org",
    "[a]: https://example.org 'title'\n\n[a]",
    "```html\n<script>alert(1)</script>\n```",
    '```"><script>alert(1)</script>\ncode\n```',
    "```python\nnever closed <script>",
    "# <script>\n\n| a | <i> |\n|:-:|--:|\n| <u> | 'x' |",
    "&lt;script&gt; &#60;script&#62;",
    "`</code><script>`",
]


@pytest.mark.parametrize("answer", HOSTILE)
def test_hostile_markup_is_text(answer):
    text_of(str(render_answer(answer)))


def test_what_was_written_is_still_there():
    text = text_of(str(render_answer("<script>alert(1)</script> [a](javascript:b) ![c](https://d.e/f.png)")))
    assert text.strip() == "<script>alert(1)</script> [a](javascript:b) ![c](https://d.e/f.png)"


@given(st.text(alphabet=st.sampled_from("<>&\"'`~*_#|-[]()!:\\ \n\tab1\x00\x1b\u202e"), max_size=80))
@settings(max_examples=200, deadline=None)
def test_no_text_escapes(answer):
    text_of(str(render_answer(answer)))


@given(
    st.text(st.characters(exclude_characters="\r\x00", exclude_categories=["Cs"]), max_size=60),
    st.sampled_from(["", "python", "sql", "html", "no-such-language", "<i>"]),
)
@settings(max_examples=100, deadline=None)
def test_code_keeps_its_text(code, language):
    assert text_of(str(render_code(code, language))).rstrip("\n") == code.rstrip("\n")


def test_python_is_coloured_with_classes():
    html = render_answer("```python\ndef f():\n    return 'x'\n```")
    assert '<span class="k">def</span>' in html
    assert "style=" not in html


def test_control_and_direction_characters_are_seen():
    assert visible("a\x00b\x1b[31m\u202ec\td\n") == "a␀b␛[31m⟨U+202E⟩c\td\n"


def test_an_endless_answer_is_cut_and_says_so():
    html = render_answer("word " * MOST_CHARACTERS)
    assert f"{4 * MOST_CHARACTERS:,} more characters are not shown here." in html
    assert len(html) < 1.1 * MOST_CHARACTERS


@pytest.mark.parametrize(
    "answer",
    ["[" * 100_000, "> " * 50_000, "*a **b " * 15_000, "```java\n" + "<A" * 19_000, "```python\n" + "f'{" * 13_000],
)
def test_answers_made_to_be_slow_are_rendered_in_seconds(answer):
    start = time.monotonic()
    text_of(str(render_answer(answer)))
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("text", ["a|b", "x`y|z", "<i>\n# h", "**b** [l](u)"])
def test_foreign_text_stays_in_its_table_cell(text):
    for cell in (code_cell(text), plain_cell(text)):
        assert "\n" not in cell
        assert "|" not in cell.replace("\\|", "")
    assert "<" not in plain_cell(text).replace("\\<", "")
