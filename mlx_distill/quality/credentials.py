"""Finds what looks like a credential in a text, and says only of what kind it is: the text itself never leaves.

Three things are looked for: tokens with a shape that a provider made recognisable, secrets by their place (in a URL,
after `Bearer`, in a private key block, as a JSON web token), and strings that look random and are assigned to a name
like `api_key`. What is plainly made up, such as `your-api-key`, `xxxx`, `EXAMPLE`, `abcdef123456` or `P@ssw0rd`, is
passed over.

The patterns are our own. The scanners on offer either need more than linear time on hostile text, or load a second
language's runtime or seconds of rules for a check that takes microseconds here. All quantifiers are bounded and each
pattern starts at a literal or a boundary, so that a megabyte takes a second or two, whatever it is made of.

Not found: passwords made of words, secrets in names that say nothing, encoded or split secrets, and tokens of
providers that are not listed. This is a net for accidents, not a guarantee.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import log2

_START = r"(?<![A-Za-z0-9])"
_END = r"(?![A-Za-z0-9])"


@dataclass(frozen=True)
class _Shape:
    """Tokens of one provider.

    Attributes:
        marks: Literals of which a text has one wherever the pattern can match; they are found much faster.
        pattern: Begins with a mark; what varies is judged by `looks_random`.
    """

    kind: str
    marks: tuple[str, ...]
    pattern: re.Pattern[str]


def _shape(kind: str, pattern: str, *marks: str) -> _Shape:
    return _Shape(kind, marks, re.compile(_START + pattern + _END, re.ASCII))


_SHAPES = (
    _shape("AWS access key", r"(?:AKIA|ASIA)[A-Z2-7]{16}", "AKIA", "ASIA"),
    _shape("Google API key", r"AIza[\w-]{35}", "AIza"),
    _shape("Google client secret", r"GOCSPX-[\w-]{28}", "GOCSPX-"),
    _shape("Azure storage key", r"AccountKey=[A-Za-z0-9+/]{86}==", "AccountKey="),
    _shape("Anthropic API key", r"sk-ant-[a-z0-9]{2,10}-[\w-]{40,200}+", "sk-ant-"),
    _shape("OpenAI API key", r"sk-(?:(?:proj|svcacct|admin)-[\w-]{40,200}+|[A-Za-z0-9]{48})", "sk-"),
    _shape("OpenRouter API key", r"sk-or-v1-[0-9a-f]{64}", "sk-or-v1-"),
    _shape("Hugging Face token", r"hf_[A-Za-z0-9]{30,40}+", "hf_"),
    _shape("Groq API key", r"gsk_[A-Za-z0-9]{40,60}+", "gsk_"),
    _shape("xAI API key", r"xai-[A-Za-z0-9]{70,90}+", "xai-"),
    _shape("Replicate token", r"r8_[A-Za-z0-9]{37}", "r8_"),
    _shape("Perplexity API key", r"pplx-[A-Za-z0-9]{40,60}+", "pplx-"),
    _shape("GitHub token", r"(?:gh[pousr]_[A-Za-z0-9]{36,255}+|github_pat_[A-Za-z0-9_]{60,90}+)", "gh", "github_pat_"),
    _shape("GitLab token", r"glpat-[\w-]{20,60}+", "glpat-"),
    _shape("Slack token", r"xox[abeprs]-[A-Za-z0-9-]{20,250}+", "xox"),
    _shape("Slack webhook", r"hooks\.slack\.com/services/T\w{6,14}/B\w{6,14}/[A-Za-z0-9]{20,30}+", "hooks.slack.com"),
    _shape("Stripe key", r"[rs]k_live_[A-Za-z0-9]{20,120}+", "k_live_"),
    _shape("SendGrid key", r"SG\.[\w-]{22}\.[\w-]{43}", "SG."),
    _shape("Twilio key", r"SK[0-9a-f]{32}", "SK"),
    _shape("Telegram bot token", r"[0-9]{8,10}+:AA[\w-]{33}", ":AA"),
    _shape("DigitalOcean token", r"do[opr]_v1_[0-9a-f]{64}", "_v1_"),
    _shape("npm token", r"npm_[A-Za-z0-9]{36}", "npm_"),
    _shape("PyPI token", r"pypi-AgEI[\w-]{50,300}+", "pypi-AgEI"),
    _shape("age secret key", r"AGE-SECRET-KEY-1[A-Z0-9]{58}", "AGE-SECRET-KEY-1"),
)

_PRIVATE_KEY = re.compile(r"-----BEGIN (?:[A-Z0-9]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?-----")
_KEY_BODY_CHARACTERS = 600
_BETWEEN_LINES = re.compile(r"\\[nr]|[\s\"'+,]")
_KEY_BODY = re.compile(r"[A-Za-z0-9+/]{60}")

_JSON_WEB_TOKEN = re.compile(r"(?<![\w-])(eyJ[\w-]{10,2000}+)\.(eyJ[\w-]{4,4000}+)\.[\w-]{20,1000}+", re.ASCII)
_BEARER = re.compile(r"\b[Bb][Ee][Aa][Rr][Ee][Rr]\s{1,3}([\w.~+/=-]{20,500}+)", re.ASCII)
_URL_PASSWORD = re.compile(
    r"(?<![A-Za-z0-9+.-])[A-Za-z][A-Za-z0-9+.-]{1,20}+://[^\s/@:\"'`<>]{0,100}+:([^\s/@\"'`<>]{8,200}+)@[\w\[]"
)
_ASSIGNED = re.compile(
    # The name, or the end of it; then perhaps a closing quotation mark or bracket, and a type.
    r"((?:pass(?:word|wd|phrase)|pwd|secret|token|credential|(?:api|access|private|signing|encryption|auth)[_-]?key)"
    r"[\w-]{0,30}+)[\"'`]?\]?[ \t]{0,4}+(?::[ \t]{0,4}[a-z][\w\[\], |.]{0,30}?)?[ \t]{0,4}(?:=>|:=|=|:)[ \t]{0,4}+"
    r"(?:([\"'`])([^\s\"'`]{10,300}+)\2|([\w+/.~=-]{16,300}+)(?=[\s\"'`;,#]|$))",
    re.IGNORECASE | re.ASCII,
)
#: What such a name holds instead of the secret.
_NOT_THE_SECRET = re.compile(
    r"tokeni[sz]|hash|digest|checksum|ur[li]|path|file|(?:name|id|type|field|header|pattern|regex|prefix|expir\w*)$",
    re.IGNORECASE,
)
_PASSWORD_NAME = re.compile(r"pass|pwd", re.IGNORECASE)
_SHORTEST_PASSWORD = 10
_SHORTEST_SECRET = 16

_MADE_UP = re.compile(
    r"example|sample|dummy|fake|your|placehold|change.?me|insert|replace|redact|todo|demo|x{4}|\.{3}|\*{3}|_here"
    r"|passw|secret|letme|welcome|hunter|admin|qwert|abcd|1234|deadbeef|cafebabe|[<>{}]|\$\(|%s|^\$"
)
_LEET = str.maketrans("0134578@$!", "oieastbasi")
_FEWEST_BITS = 3.0
#: Share of neighbours that are a letter and a digit, or a small and a capital letter, for short and for long strings.
_LEAST_MIXED, _LEAST_MIXED_LONG = 0.28, 0.22
_LONG = 32


def find_credentials(text: str) -> list[str]:
    """The kinds of credentials that a text seems to hold, each once, in a fixed order; empty where there are none.

    Neither the result nor an error holds any part of the text.
    """
    kinds = [shape.kind for shape in _SHAPES if _has_shape(text, shape)]
    kinds += [kind for kind, found in _PLACES.items() if found(text)]
    return kinds


def looks_random(value: str) -> bool:
    """Whether a string looks drawn at random, not written by a person.

    It mixes letters and digits so often, and repeats itself so little, as random ones do, has no long runs such as
    "abcd", and none of the words that stand in for a secret, in plain or with digits for letters.
    """
    lowered = value.lower()
    if _MADE_UP.search(lowered) or _MADE_UP.search(lowered.translate(_LEET)):
        return False
    neighbours = list(pairwise(value))
    mixed = sum(a.isalpha() != b.isalpha() if (a + b).isalnum() else False for a, b in neighbours)
    mixed += sum(a.islower() and b.isupper() for a, b in neighbours)
    in_sequence = sum(ord(b) - ord(a) in (0, 1) for a, b in neighbours)
    return (
        mixed >= (_LEAST_MIXED if len(value) < _LONG else _LEAST_MIXED_LONG) * len(neighbours)
        and in_sequence <= 0.3 * len(neighbours)
        and _bits_per_character(value) >= _FEWEST_BITS
    )


def _bits_per_character(value: str) -> float:
    """Shannon entropy of the characters' frequencies."""
    return -sum(count / len(value) * log2(count / len(value)) for count in Counter(value).values())


def _has_shape(text: str, shape: _Shape) -> bool:
    if not any(mark in text for mark in shape.marks):
        return False
    return any(_seems_real(match[0]) for match in shape.pattern.finditer(text))


def _seems_real(token: str) -> bool:
    """Whether a token of a known shape is more than a stand-in: the shape already says most."""
    return _bits_per_character(token) >= _FEWEST_BITS and not _STAND_IN.search(token.lower())


_STAND_IN = re.compile(r"example|sample|dummy|fake|your|placehold|redact|x{5}|0{8}|123456|abcdef|\.{3}")


def _has_private_key(text: str) -> bool:
    return any(_holds_key(text[m.end() : m.end() + _KEY_BODY_CHARACTERS]) for m in _PRIVATE_KEY.finditer(text))


def _holds_key(after: str) -> bool:
    body = _KEY_BODY.search(_BETWEEN_LINES.sub("", after))
    return body is not None and _bits_per_character(body[0]) >= _FEWEST_BITS and not _STAND_IN.search(body[0].lower())


def _has_json_web_token(text: str) -> bool:
    for match in _JSON_WEB_TOKEN.finditer(text):
        header, payload = _decoded(match[1]), _decoded(match[2])
        if "alg" in header and not _is_textbook(payload):
            return True
    return False


def _is_textbook(payload: dict[str, object]) -> bool:
    return payload.get("name") == "John Doe" or payload.get("sub") == "1234567890"


def _decoded(part: str) -> dict[str, object]:
    try:
        fields = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    except (binascii.Error, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _assigned(text: str) -> Iterator[tuple[str, str]]:
    """Names and what is assigned to them, where that may be a secret."""
    for match in _ASSIGNED.finditer(text):
        name, value = match[1], match[3] or match[4]
        if not _NOT_THE_SECRET.search(name):
            yield name, value


def _has_assigned_secret(text: str) -> bool:
    return any(
        len(value) >= (_SHORTEST_PASSWORD if _PASSWORD_NAME.search(name) else _SHORTEST_SECRET) and looks_random(value)
        for name, value in _assigned(text)
    )


def _has_url_password(text: str) -> bool:
    return "://" in text and any(looks_random(match[1]) for match in _URL_PASSWORD.finditer(text))


def _has_bearer_token(text: str) -> bool:
    return any(looks_random(match[1]) for match in _BEARER.finditer(text) if not match[1].startswith("eyJ"))


_PLACES: dict[str, Callable[[str], bool]] = {
    "private key": _has_private_key,
    "JSON web token": _has_json_web_token,
    "password in a URL": _has_url_password,
    "bearer token": _has_bearer_token,
    "assigned secret": _has_assigned_secret,
}
