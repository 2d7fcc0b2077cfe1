"""The page: one file, no outside reference, a policy that lets only its own style and script work."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from mlx_distill.layout import logits_record, write_text
from mlx_distill.logit_cache import LogitsRecord
from mlx_distill.report.commands import commands_to_repeat
from mlx_distill.report.evidence import read_evidence

HOSTILE = (
    "<script>document.title='owned'</script><img src=https://example.org/x.png onerror=alert(1)>\n\n"
    "</style></script></section><iframe src='https://example.org'></iframe>\n\n"
    "![p](https://example.org/p.png) [l](javascript:alert(1))\n\n```html\n<script>alert(2)</script>\n"
)
VOID = {"meta", "link", "br", "hr", "img", "input"}
LOADS = {"src", "srcset", "poster", "data", "action", "formaction", "background", "manifest", "ping"}


class Page(HTMLParser):
    """Collects the tags of a page and checks that they nest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.inside: dict[str, str] = {"script": "", "style": ""}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in self.inside:
            self.inside[self.open[-1]] += data


@pytest.fixture
def html(project, read):
    made = project(
        answers={("task-0", "base"): HOSTILE, ("task-1", "teacher"): ""},
        cut={("task-0", "distilled")},
        judges=("rubric", "<script>alert(3)</script>"),
        model_name="<b>model</b>",
    )
    return read(made).page


def test_nothing_is_loaded_from_anywhere(html):
    for tag, attributes in Page(html).tags:
        assert tag not in {"iframe", "object", "embed", "base", "img", "image", "use", "form", "video", "audio"}
        assert not LOADS & attributes.keys()
        if "href" in attributes:
            assert re.match(r"#[\w-]+$|data:,$", attributes["href"] or ""), attributes
        assert not [name for name in attributes if name.startswith("on") or name == "style"]


def test_the_style_sheet_fetches_nothing(html):
    style = Page(html).inside["style"]
    assert "url(" not in style
    assert "@import" not in style
    assert "@font-face" not in style


def test_the_policy_allows_exactly_this_style_and_this_script(html):
    page = Page(html)
    policies = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert len(policies) == 1
    rules = dict(rule.split(" ", 1) for rule in (policies[0] or "").split("; "))
    assert rules["default-src"] == "'none'"
    for kind in ("script", "style"):
        assert sum(tag == kind for tag, _ in page.tags) == 1
        digest = base64.b64encode(hashlib.sha256(page.inside[kind].encode()).digest()).decode()
        assert rules[f"{kind}-src"] == f"'sha256-{digest}'"


def test_hostile_text_is_shown_as_text(html):
    assert "&lt;script&gt;document.title=&#x27;owned&#x27;&lt;/script&gt;" in html.replace(
        "'owned'", "&#x27;owned&#x27;"
    )
    assert "&lt;b&gt;model&lt;/b&gt;" in html
    assert "alert(3)" in html
    assert "<script>alert" not in html


def test_flags_rationales_and_commands_are_there(html):
    assert "cut at 64 tokens" in html
    assert "Why correctness is so." in html
    assert "mlx-distill train --data data/demo --model smollm2-135m --run adapters/demo --epochs 2" in html
    assert "mlx-distill compare" in html
    assert "rubric (a rubric, not a model&#39;s opinion)" in html


def test_the_commands_name_the_logits_that_were_learned(project, tmp_path):
    evidence = read_evidence(project().write())
    logits = tmp_path / "logits"
    config = {**evidence.run.config, "distill": "jsd", "teacher_logits": str(logits)}
    taught = evidence.run.model_copy(update={"config": config, "distilled_from": "big"})
    written = f"mlx-distill logits --data data/demo --teacher mlx:big --out {logits}"

    def before_training():
        lines = commands_to_repeat(replace(evidence, run=taught))
        at = next(at for at, line in enumerate(lines) if line.startswith("mlx-distill train"))
        assert f"--distill jsd --teacher-logits {logits}" in lines[at]
        return lines[at - 1]

    assert before_training() == written
    known = {"teacher": "big", "words": 99, "vocabulary_sha256": "a", "template_sha256": "b", "max_length": 9}
    record = LogitsRecord.model_validate({**known, "top_k": 7, "dtype": "float32", "splits": {}})
    write_text(logits_record(logits), record.to_json())
    assert before_training() == f"{written} --top-k 7"


def test_ids_are_unique_and_links_lead_somewhere(html):
    tags = Page(html).tags
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {(a["href"] or "")[1:] for t, a in tags if t == "a"}
    assert targets <= set(ids)


def test_the_flow_chart_keeps_foreign_text_in_its_labels(project, read):
    made = project(model_name='x"] --> evil["<script>', teacher='recorded:a"b\nc')
    text = read(made).flow
    lines = text.splitlines()
    assert lines[0] == "flowchart LR"
    for line in lines[1:]:
        assert re.match(r'^  (\w+\["[^"<>\[\]]*(<br/>[^"<>\[\]]*)*"\]|\w+( --> \w+)+|style \w+ [\w:#,-]+)$', line), line
    assert "104 prompts" in text
    assert "validation loss 1.600 → 1.300" in text
