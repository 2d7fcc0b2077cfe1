"""A model's answer as HTML that can do nothing but be read.

Markdown is rendered with raw HTML switched off, and without links, images and references, so that no answer can
fetch, lead away or run anything; what it wrote in their place is shown as text. Code is coloured by Pygments with
classes, never with inline styles.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from functools import cache
from itertools import groupby
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markupsafe import Markup, escape
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import STANDARD_TYPES, _TokenType

from mlx_distill.report.wording import visible

#: Longer answers are shown up to here, and say so.
MOST_CHARACTERS = 40_000
#: Longer blocks of code, and those whose lexer takes longer than this, are shown without colours: on input made for
#: it a lexer's time grows with the square of the length.
MOST_COLOURED = 40_000
MOST_SECONDS = 2.0
#: Languages that are coloured. Each further lexer would be further code that a hostile answer could choose to run.
_LANGUAGE_NAMES = (
    "bash c c++ console cpp csharp css go html ini java javascript js json jsx kotlin php postgresql py pycon python "
    "python3 rb rs ruby rust scala sh shell sql sqlite3 swift toml ts tsx typescript xml yaml"
)
LANGUAGES = frozenset(_LANGUAGE_NAMES.split())
#: Pygments' classes of tokens that the page's style colours; others would only make it larger.
_STYLED_NAMES = (
    "k kc kd kn kp kr kt ow s s1 s2 sa sb sc dl se sh si sx sr ss sd c ch cm cp cpf c1 cs m mb mf mh mi mo il nf fm nt "
    "nc ne nn nd na nb bp"
)
STYLED = frozenset(_STYLED_NAMES.split())
#: The headings of an answer start below those of the page.
_HEADING_SHIFT = 4


def render_answer(text: str, most: int = MOST_CHARACTERS, *, whole: str = "") -> Markup:
    """Render an answer's Markdown.

    Args:
        most: Characters to show.
        whole: Where all of them are, as a sentence, for an answer that is cut.

    Returns:
        HTML made of tags of ours alone, each closed.
    """
    shown = visible(text[:most])
    html = Markup(_markdown().render(shown))
    if len(text) > most:
        left_out = len(text) - most
        html += Markup('<p class="note">{} more characters are not shown here. {}</p>').format(f"{left_out:,}", whole)
    return html


def render_code(code: str, language: str) -> Markup:
    """Colour a block of code; one in an unknown language stays plain."""
    lexer = _lexer(language.lower()) if len(code) <= MOST_COLOURED else None
    body = (_coloured(code, lexer) if lexer else None) or escape(code)
    name = Markup(' data-language="{}"').format(language[:20]) if language else Markup("")
    # A wide block scrolls; it has to be reachable by keyboard to be scrolled.
    return Markup('<pre tabindex="0"{}><code>{}</code></pre>\n').format(name, body)


def _coloured(code: str, lexer: Lexer) -> Markup | None:
    """Highlighted code; None where that takes too long."""
    deadline = time.monotonic() + MOST_SECONDS
    tokens = []
    for token in lexer.get_tokens(code):
        if time.monotonic() > deadline:
            return None
        tokens.append(token)
    return Markup("".join(_spans(tokens)))


def _spans(tokens: Iterable[tuple[_TokenType, str]]) -> Iterator[str]:
    """Tokens in spans of the classes that the page's style knows; neighbours of one class share a span."""
    for name, group in groupby(tokens, key=lambda token: _class_of(token[0])):
        text = str(escape("".join(value for _, value in group)))
        yield f'<span class="{name}">{text}</span>' if name else text


@cache
def _class_of(kind: _TokenType) -> str:
    known = next(k for k in reversed(kind.split()) if k in STANDARD_TYPES)
    return STANDARD_TYPES[known] if STANDARD_TYPES[known] in STYLED else ""


@cache
def _lexer(language: str) -> Lexer | None:
    return get_lexer_by_name(language, stripnl=False) if language in LANGUAGES else None


class _Renderer(RendererHTML):
    """Code in our own frame, headings further down."""

    def fence(self, tokens: Sequence[Token], idx: int, options: Any, env: MutableMapping[str, Any]) -> str:
        words = tokens[idx].info.split()
        return str(render_code(tokens[idx].content, words[0] if words else ""))

    def code_block(self, tokens: Sequence[Token], idx: int, options: Any, env: MutableMapping[str, Any]) -> str:
        return str(render_code(tokens[idx].content, ""))

    def heading_open(self, tokens: Sequence[Token], idx: int, options: Any, env: MutableMapping[str, Any]) -> str:
        return f"<{_shifted(tokens[idx].tag)}>"

    def heading_close(self, tokens: Sequence[Token], idx: int, options: Any, env: MutableMapping[str, Any]) -> str:
        return f"</{_shifted(tokens[idx].tag)}>\n"

    # Tables align their cells with classes: inline styles are refused by the page's policy.
    def th_open(self, tokens: Sequence[Token], idx: int, options: Any, env: MutableMapping[str, Any]) -> str:
        return _cell("th", tokens[idx])

    def td_open(self, tokens: Sequence[Token], idx: int, options: Any, env: MutableMapping[str, Any]) -> str:
        return _cell("td", tokens[idx])


def _cell(tag: str, token: Token) -> str:
    style = str(token.attrs.get("style", ""))
    side = next((side for side in ("right", "center") if side in style), None)
    return f'<{tag} class="{side}">' if side else f"<{tag}>"


def _shifted(tag: str) -> str:
    return f"h{min(6, int(tag[1]) + _HEADING_SHIFT)}"


@cache
def _markdown() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}, renderer_cls=_Renderer)
    parser.enable(["table", "strikethrough"])
    return parser.disable(["html_block", "html_inline", "link", "image", "autolink", "reference"])
