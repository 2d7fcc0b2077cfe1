"""Gathers what an answer contains and how its code runs: all that the rubric looks at."""

from __future__ import annotations

import itertools
import re
import zlib
from collections import Counter
from dataclasses import dataclass

from mlx_distill.code_blocks import CodeBlock, code_blocks, prose, source
from mlx_distill.execution import Execution, Limits, run_python, run_sql
from mlx_distill.judges.python_code import PythonCode, read_python
from mlx_distill.records import Generation

#: Text beyond this many characters is not looked at, but for its end: a hundred thousand tokens fit.
MOST_CHARACTERS = 500_000

_LANGUAGES = ("python", "sql", "java", "kotlin")
_EXPLAINS = re.compile(r"\s*(explain|compare|describe|discuss|what|why|how)\b", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_][\w'-]*")
_TOKEN = re.compile(r"\w+|[^\w\s]")
_SENTENCE_END = re.compile(r"[.!?:](?:\s|$|[)\"'*`])")
_IDENTIFIER = re.compile(r"`([^`\n]{2,60})`")

_PLACEHOLDER = re.compile(
    r"(?-i:\bTODO\b|\bFIXME\b)|your (?:code|implementation|logic|query) (?:here|goes)"
    r"|implement(?:ation)? (?:this|here|goes here)|rest of (?:the|your) (?:code|implementation|function|class)"
    r"|(?:^|\s)(?:#|//|--) *\.\.\.|<your[ _-]\w+>|lorem ipsum",
    re.IGNORECASE | re.MULTILINE,
)

_FUNCTION_WORDS = """
    the a an of is are was were be been to for from with by at as and or but if that this these those it its they in on
    not can will would may must has have had do does so then than which who when where while because
"""
#: What never follows "the" or "an" in a sentence.
_AFTER_NO_ARTICLE = frozenset(_FUNCTION_WORDS.split())

_COMMON_WORDS = """
    about above after again against also another answer anything applied because been before being below between both
    cannot code could cover define different does each either else even every everybody explain example few first
    following from function functions give given goes have having helper here implement include includes input into
    itself just keep kept language like make makes many may more most must need needs never next none nothing only
    other over place print prints program python query return returned returns same second several shall short should
    show shown shows simple since small some such support supports take takes than that their them then there these
    they third this those three time times together under until usage used uses using very want what when where which
    while whose will with within without would write written your class classes java kotlin sql method methods state
    explain robust validate handle edge cases raise clear errors unit tests normal complexity alternative approach
    prefer step idea build production typed documented ready review work come down that's later space
"""
#: Words of a prompt that say how to answer, not what about.
_COMMON = frozenset(_COMMON_WORDS.split())


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for, as far as its words show.

    Attributes:
        language: The language it names, or "".
        code: Whether it wants code, not mainly an explanation.
        terms: The words it is about, stemmed, and the names it quotes.
    """

    language: str
    code: bool
    terms: frozenset[str]
    tests: bool
    complexity: bool
    alternative: bool
    robust: bool


@dataclass(frozen=True)
class Evidence:
    """What an answer contains.

    Attributes:
        finished: Whether it ended by itself, not at the token budget.
        language: The language its code is judged as, or "" where it has none.
        source: Its blocks of that language, as one script.
        words: Words outside its code.
        sentences: Sentences outside its code.
        shape: Headings, lists and tables.
        named: Those of the request's terms that it mentions.
        freshness: From 0, where it repeats itself over and over, to 1, where it does not.
        fluent: Whether its prose is made of sentences, as far as the use of "the" tells.
        placeholders: Traces of what was left out, such as TODO.
        execution: How its code ran; None where there is nothing that runs here.
        python: Facts about its Python, if that is its language and any of it parses.
    """

    asked: Asked
    text: str
    finished: bool
    blocks: tuple[CodeBlock, ...]
    language: str
    source: str
    prose: str
    words: int
    sentences: int
    shape: int
    named: frozenset[str]
    freshness: float
    fluent: bool
    placeholders: tuple[str, ...]
    execution: Execution | None
    python: PythonCode | None

    @property
    def coverage(self) -> float:
        """Share of the request's terms that the answer mentions, 0 to 1."""
        return len(self.named) / len(self.asked.terms) if self.asked.terms else 1.0

    @property
    def fences_closed(self) -> bool:
        """Whether every code block has its end."""
        return all(block.closed for block in self.blocks)

    @property
    def ends_well(self) -> bool:
        """Whether the last thing said is a whole sentence, list item, table or code block."""
        last = self.text.rstrip()
        if not self.fences_closed or not last:
            return False
        if self.blocks and not self.prose.rstrip().endswith(last[-20:]):
            return True
        line = last.splitlines()[-1].strip()
        return line.endswith((".", "!", "?", ":", "|", "`", ")", "*")) or line[:1] in "-*|#" or line[:1].isdigit()


def gather(generation: Generation, *, limits: Limits, sandbox: bool = False) -> Evidence:
    """Read an answer and run its code.

    Blocks while the code runs, at most as long as the limits allow.

    Args:
        sandbox: Whether the operating system confines it.
    """
    text = generation.text[:MOST_CHARACTERS]
    asked = read_prompt(generation.prompt.text)
    blocks = tuple(code_blocks(text))
    language = _language(blocks, asked)
    labelled = [_labelled(block, language) for block in blocks]
    script = source(labelled, language) if language else ""
    outside = prose(text, blocks)
    execution = _execute(language, script, limits, sandbox=sandbox)
    crashed = execution is not None and execution.outcome == "crashed"
    return Evidence(
        asked=asked,
        text=text,
        finished=generation.finished and len(generation.text) <= MOST_CHARACTERS,
        blocks=blocks,
        language=language,
        source=script,
        prose=outside,
        words=len(_WORD.findall(outside)),
        sentences=len(_SENTENCE_END.findall(outside)),
        shape=len(re.findall(r"^ {0,3}(?:[-*+] |\d{1,3}[.)] |#{1,6} |\|)", outside, re.MULTILINE)),
        named=frozenset(term for term in asked.terms if term in text.lower()),
        freshness=freshness(text),
        fluent=fluent(outside),
        placeholders=tuple(dict.fromkeys(match.strip() for match in _PLACEHOLDER.findall(text))),
        execution=execution,
        # What brings down one interpreter while it compiles is not given to ours.
        python=read_python(script) if language == "python" and not crashed else None,
    )


def read_prompt(prompt: str) -> Asked:
    """What a prompt asks for, as far as its words show."""
    lower = prompt.lower()
    explains = _EXPLAINS.match(prompt) is not None
    found = [language for language in _LANGUAGES if re.search(rf"\b{language}\b", lower)]
    quoted = {name.lower().split("(")[0].strip() for name in _IDENTIFIER.findall(prompt)}
    words = {_stem(word.lower()) for word in _WORD.findall(_IDENTIFIER.sub(" ", prompt))}
    terms = {term for term in words if len(term) > 3 and term not in _COMMON_STEMS}
    return Asked(
        language=found[0] if len(found) == 1 or (found and not explains) else "",
        code=not explains,
        terms=frozenset(terms | {name for name in quoted if 1 < len(name) < 40 and " " not in name}),
        tests=re.search(r"\b(?:unit tests?|test suite|test cases|include tests)\b", lower) is not None,
        complexity="complexity" in lower,
        alternative="alternative approach" in lower,
        robust=re.search(r"validate|raise clear errors|robust", lower) is not None,
    )


def freshness(text: str) -> float:
    """How little a text repeats itself: 0 for loops, 1 for writing.

    The lower of two measures, each stretched between what loops and what good answers show: the share of distinct
    sequences of eight tokens (0.3 to 0.7), and, from 400 bytes on, the ratio that zlib compresses to (0.12 to 0.22).
    """
    tokens = _TOKEN.findall(text)
    runs = Counter(zip(*(tokens[at:] for at in range(8)), strict=False))
    distinct = len(runs) / runs.total() if runs else 1.0
    data = text.encode(errors="replace")
    ratio = len(zlib.compress(data, 9)) / len(data) if len(data) >= 400 else 1.0
    return min(_between(distinct, 0.3, 0.7), _between(ratio, 0.12, 0.22))


def fluent(text: str) -> bool:
    """Whether words stand in an order that sentences have: at most 15 % of "the" and "an" are followed by such words
    as "of", "is" or "the". Shuffled words come to a third. Texts with fewer than four of the two count as fluent."""
    words = [word.lower() for word in _WORD.findall(text)]
    followers = [after for article, after in itertools.pairwise(words) if article in ("the", "an")]
    odd = sum(word in _AFTER_NO_ARTICLE for word in followers)
    return len(followers) < 4 or odd <= 0.15 * len(followers)


def _between(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))


def _stem(word: str) -> str:
    word = word.removesuffix("'s")
    for ending in ("ing", "ies", "es", "ed", "s", "ly", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word.removesuffix(ending)
    return word


_COMMON_STEMS = _COMMON | {_stem(word) for word in _COMMON}


def _language(blocks: tuple[CodeBlock, ...], asked: Asked) -> str:
    """The language asked for where the answer has it or may mean it by an unlabelled block, else its commonest."""
    sizes: Counter[str] = Counter()
    for block in blocks:
        sizes[block.language] += len(block.text)
    if asked.language and (sizes[asked.language] or (sizes[""] and asked.code)):
        return asked.language
    known = [(size, language) for language, size in sizes.items() if language in _LANGUAGES]
    return max(known)[1] if known else ""


def _labelled(block: CodeBlock, language: str) -> CodeBlock:
    """An unlabelled block that looks like code in the answer's language counts as such."""
    looks: dict[str, str] = {
        "python": r"^(?:def|class|import|from|for|if|with|async|@\w|print\(|\w+ = )",
        "sql": r"^\s*(?:SELECT|WITH|CREATE|INSERT|UPDATE|DELETE)\b",
        "java": r"\b(?:class|record|interface|enum) \w+.*\{",
        "kotlin": r"\b(?:fun|val|class) \w+",
    }
    if block.language or not language or not re.search(looks[language], block.text, re.MULTILINE | re.IGNORECASE):
        return block
    return CodeBlock(language, block.text, block.closed, block.start, block.end)


def _execute(language: str, script: str, limits: Limits, *, sandbox: bool) -> Execution | None:
    if not script.strip():
        return None
    if language == "python":
        return run_python(script, limits=limits, sandbox=sandbox)
    return run_sql(script, limits=limits, sandbox=sandbox) if language == "sql" else None
