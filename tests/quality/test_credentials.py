"""Credentials: what leaks is named by its kind alone, what is made up is left, and hostile texts take seconds.

All secrets here are drawn at random when the tests run: the file itself holds none.
"""

from __future__ import annotations

import base64
import json
import random
import string
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_distill.quality.credentials import find_credentials, looks_random

ANSWERS = Path(__file__).parents[2] / "data" / "starter" / "answers"
HEX, UPPER, ALNUM = "0123456789abcdef", string.ascii_uppercase + "234567", string.ascii_letters + string.digits


def drawn(length: int, alphabet: str = ALNUM, seed: int = 0) -> str:
    """A random string that looks so: one in some hundred, such as one of few digits, does not."""
    generator = random.Random(seed)
    while not looks_random(found := "".join(generator.choices(alphabet, k=length))):
        pass
    return found


def web_token(payload: dict[str, str]) -> str:
    parts = [json.dumps(part).encode() for part in ({"alg": "HS256", "typ": "JWT"}, payload)]
    return ".".join([base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts] + [drawn(43)])


def private_key(kind: str = "RSA PRIVATE KEY", line_end: str = "\n") -> str:
    lines = [drawn(64, seed=n) for n in range(12)]
    return line_end.join([f"-----BEGIN {kind}-----", *lines, f"-----END {kind}-----"])


TOKENS: dict[str, tuple[str, str]] = {
    "aws": ("AWS access key", "AKIA" + drawn(16, UPPER)),
    "aws session": ("AWS access key", "ASIA" + drawn(16, UPPER, 1)),
    "google": ("Google API key", "AIza" + drawn(35)),
    "google oauth": ("Google client secret", "GOCSPX-" + drawn(28)),
    "azure": ("Azure storage key", f"AccountName=x;AccountKey={drawn(86)}==;EndpointSuffix=core"),
    "anthropic": ("Anthropic API key", "sk-ant-api03-" + drawn(93)),
    "openai": ("OpenAI API key", "sk-proj-" + drawn(80)),
    "openai old": ("OpenAI API key", "sk-" + drawn(48)),
    "openrouter": ("OpenRouter API key", "sk-or-v1-" + drawn(64, HEX)),
    "hugging face": ("Hugging Face token", "hf_" + drawn(34)),
    "groq": ("Groq API key", "gsk_" + drawn(52)),
    "xai": ("xAI API key", "xai-" + drawn(80)),
    "replicate": ("Replicate token", "r8_" + drawn(37)),
    "perplexity": ("Perplexity API key", "pplx-" + drawn(48)),
    "github": ("GitHub token", "ghp_" + drawn(36)),
    "github fine": ("GitHub token", "github_pat_" + drawn(22) + "_" + drawn(59, seed=1)),
    "gitlab": ("GitLab token", "glpat-" + drawn(20)),
    "slack": ("Slack token", f"xoxb-{drawn(12)}-{drawn(24)}"),
    "slack hook": (
        "Slack webhook",
        f"https://hooks.slack.com/services/T{drawn(9, UPPER)}/B{drawn(9, UPPER, 1)}/{drawn(24)}",
    ),
    "stripe": ("Stripe key", "sk_live_" + drawn(24)),
    "sendgrid": ("SendGrid key", f"SG.{drawn(22)}.{drawn(43)}"),
    "twilio": ("Twilio key", "SK" + drawn(32, HEX)),
    "telegram": ("Telegram bot token", f"{random.Random(3).randint(10**8, 10**9)}:AA{drawn(33)}"),
    "digitalocean": ("DigitalOcean token", "dop_v1_" + drawn(64, HEX)),
    "npm": ("npm token", "npm_" + drawn(36)),
    "pypi": ("PyPI token", "pypi-AgEIcHlwaS5vcmc" + drawn(120)),
    "age": ("age secret key", "AGE-SECRET-KEY-1" + drawn(58, UPPER)),
    "key block": ("private key", private_key()),
    "key in json": ("private key", json.dumps({"key": private_key("PRIVATE KEY")})),
    "key in python": ("private key", private_key("EC PRIVATE KEY", '\\n"\n    "')),
    "web token": ("JSON web token", web_token({"sub": "u-77"})),
    "url": ("password in a URL", f"postgresql://app:{drawn(14)}@db.internal:5432/shop"),
    "url without user": ("password in a URL", f"redis://:{drawn(24)}@cache:6379/0"),
    "bearer": ("bearer token", f'curl -H "Authorization: Bearer {drawn(40)}" https://api'),
    "assigned": ("assigned secret", f'api_key = "{drawn(32, HEX)}"'),
    "camel case": ("assigned secret", f'String clientSecret = "{drawn(32)}";'),
    "typed": ("assigned secret", f"API_TOKEN: Final[str] = '{drawn(24)}'"),
    "json": ("assigned secret", f'{{"aws_secret_access_key": "{drawn(40)}"}}'),
    "environment": ("assigned secret", f"export DB_PASSWORD={drawn(20)}\n"),
    "yaml": ("assigned secret", f"  auth-key: {drawn(24)}\n"),
    "header": ("assigned secret", f"X-Api-Key: {drawn(32, HEX)}"),
    "argument": ("assigned secret", f"connect(user='app', password='{drawn(14)}!')"),
    "go": ("assigned secret", f'token := "{drawn(40)}"'),
    "subscript": ("assigned secret", f'config["private_key"] = "{drawn(44)}"'),
}


@pytest.mark.parametrize("name", TOKENS)
def test_each_kind_is_found_in_a_text_around_it(name: str) -> None:
    kind, token = TOKENS[name]
    assert find_credentials(f"Here it is:\n\n```\n{token}\n```\nand that was it.") == [kind]


@pytest.mark.parametrize("name", TOKENS)
def test_the_result_holds_nothing_of_the_text(name: str) -> None:
    _, token = TOKENS[name]
    shown = " ".join(find_credentials(token))
    assert not any(token[at : at + 8] in shown for at in range(len(token) - 8))


def test_all_kinds_at_once_each_once_in_a_fixed_order() -> None:
    texts = [token for _, token in TOKENS.values()]
    forwards, backwards = (find_credentials("\n".join(order)) for order in (texts, [*reversed(texts)]))
    assert forwards == backwards
    assert sorted(forwards) == sorted({kind for kind, _ in TOKENS.values()})


@pytest.mark.parametrize("path", sorted(ANSWERS.glob("*.md")), ids=lambda path: path.stem)
def test_the_shipped_answers_hold_none(path: Path) -> None:
    assert find_credentials(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        'api_key = "your-api-key"',
        'api_key = "YOUR_API_KEY_GOES_HERE_1234567890"',
        'token = "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"',
        'password = "hunter2"',
        'password = "P@ssw0rd123!"',
        'password = "S3cr3t-Passw0rd-2024"',
        'secret = "<insert-32-character-token>"',
        'secret = "0123456789abcdef0123456789abcdef"',
        'secret_key = "abcdef1234567890abcdef1234567890"',
        "SECRET_KEY = 'change-me-in-production-9f8e7d6c'",
        "AWS_ACCESS_KEY_ID=AKIAIOSFODNN7EXAMPLE",
        "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
        'api_key = os.environ["API_KEY"]',
        "token = secrets.token_urlsafe(32)",
        "token = self.tokenizer.encode(text2)[position1]",
        "access_token=accessTokenForTheSecondClient2",
        'password_hash = "5e884898da28047151d0e56f8dc6292773603d0d6aabbdd62a11ef721d1542d8"',
        'token_url = "https://login7.host3.org/oauth2/v2.0/token"',
        'tokenizer = "Qwen/Qwen2.5-1.5B-Instruct-GPTQ-Int4"',
        "postgresql://user:password@localhost:5432/app",
        "postgresql://user:${DB_PASSWORD}@db/app",
        "redis://:changeme@cache:6379",
        "https://example.org:8080/@user/page",
        "Authorization: Bearer <token>",
        "Authorization: Bearer YOUR_ACCESS_TOKEN_GOES_HERE",
        "sk-ant-api03-" + "x" * 90,
        "sk-ant-your-key-here",
        "ghp_" + "x" * 36,
        "hf_" + "0" * 34,
        "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA...\n-----END RSA PRIVATE KEY-----",
        "-----BEGIN CERTIFICATE-----\n" + drawn(64),
        web_token({"sub": "1234567890", "name": "John Doe"}),
        f"etag = '{drawn(32, HEX)}'",
        f"commit {drawn(40, HEX)}",
        f'"sha256": "{drawn(64, HEX)}"',
    ],
)
def test_what_is_made_up_or_no_secret_is_left(text: str) -> None:
    assert find_credentials(text) == []


@pytest.mark.parametrize(("length", "share"), [(16, 0.7), (24, 0.9), (32, 0.95), (64, 0.98)])
def test_most_random_strings_look_random(length: int, share: float) -> None:
    generator = random.Random(length)
    for alphabet in (HEX, ALNUM, ALNUM + "+/"):
        seen = sum(looks_random("".join(generator.choices(alphabet, k=length))) for _ in range(500))
        assert seen >= share * 500


HOSTILE: dict[str, Callable[[], str]] = {
    "names": lambda: "secret" * 170_000,
    "names and a sign": lambda: "secret" * 170_000 + "=",
    "assignments": lambda: "api_key = " * 100_000,
    "assignments of themselves": lambda: "pwd=" * 250_000,
    "open quotes": lambda: ("pwd='" + "a" * 295) * 3_300,
    "types": lambda: ("secret: " + "a[],|. ") * 66_000,
    "long names": lambda: ("secret" + "a" * 40) * 22_000,
    "token starts": lambda: "eyJ" * 333_000,
    "token parts": lambda: ("eyJ" + "a" * 15 + ".") * 50_000,
    "addresses": lambda: "http://" + "a:" * 500_000,
    "many addresses": lambda: ("ab://" + ":" * 100) * 9_500,
    "key blocks": lambda: "-----BEGIN PRIVATE KEY-----" * 40_000,
    "block starts": lambda: "-----BEGIN " + "A " * 500_000,
    "bearers": lambda: "bearer aaaaaaaaaaaaaaaaaaaa1B " * 35_000,
    "prefixes": lambda: "sk-ant-a1-" * 100_000,
    "digits": lambda: "1" * 1_000_000,
    "blanks": lambda: " " * 1_000_000,
    "quotes": lambda: "'" * 1_000_000,
    "nulls": lambda: "\0" * 1_000_000,
    "half characters": lambda: "\ud800=" * 500_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_megabyte_takes_seconds(name: str) -> None:
    text = HOSTILE[name]()
    start = time.process_time()
    find_credentials(text)
    # Quadratic time would take minutes; the bound leaves room for a slow machine.
    assert time.process_time() - start < 15


@given(st.text())
def test_any_text_is_read(text: str) -> None:
    assert find_credentials(text) == find_credentials(text)
    assert isinstance(looks_random(text), bool)


@given(st.text(alphabet="eyJ0hbGciOiJ.-_=", min_size=20, max_size=200))
def test_broken_web_tokens_are_read(text: str) -> None:
    find_credentials("eyJhbGciOi" + text + ".eyJ" + text + "." + "a" * 30)
