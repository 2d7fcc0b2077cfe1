"""How a reader gets through the page: search, filters, keys, differences, curves; on a phone, in the dark, on paper.

Collected only where a Chromium is on the path.
"""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from mlx_distill.config import ReportConfig
from mlx_distill.report.run import report
from tests.report.chromium import CHROMIUM, browser

if CHROMIUM:
    #: Distilled passes tasks 0, 2, 3, 5, …; base 0, 3, 6, … (see `Project.passes`).
    TASKS = 14
    WIDE = (
        "```text\n"
        + "wide " * 200
        + "\n```\n\n| "
        + " | ".join(f"column {n}" for n in range(30))
        + " |\n"
        + "|---" * 30
    )
    HOSTILE = {
        (
            "task-0",
            "base",
        ): "<script>document.title='owned'</script><img src='http://127.0.0.1:9/x.png' onerror=alert(1)>",
        (
            "task-0",
            "distilled",
        ): "</code></pre></details></article></main><script>document.title='owned'</script>\n```js",
        ("task-1", "base"): "\x00\x1b[31m\u202egnp.exe\u202c \x07 ]]> --> {{ 7 * 7 }} {% raw %}",
        (
            "task-1",
            "distilled",
        ): "```html\n<script>document.title='owned'</script>\n\n<style>body { display: none }</style>",
        ("task-2", "base"): "",
        ("task-2", "distilled"): "endless " * 50_000,
        ("task-3", "base"): "one\ntwo\nthree\n",
        ("task-3", "distilled"): "one\n2 <b>bold</b>\nthree\nfour\n",
        ("task-4", "distilled"): WIDE + "|\n" + "x" * 3000,
    }

    @pytest.fixture
    def page(project, tmp_path):
        made = project(prompts=TASKS + 1, tested=TASKS, answers=HOSTILE, judges=("anthropic:claude-opus-4-6", "rubric"),
                       duels={"openai:gpt-5": lambda n: ("first", "second" if n % 2 else "first")})  # fmt: skip
        return report(ReportConfig(comparison=made.write(), only="html,md")).page

    def test_nothing_leaves_the_page_and_nothing_of_an_answer_runs(page, tmp_path):
        with browser(tmp_path) as tab:
            tab.open(page)
            tab.click("#open-all")
            tab.until("document.querySelectorAll('.case > details[open]').length === 15")
            tab.run("document.querySelectorAll('.diff').forEach(diff => { diff.open = true; })")
            assert "owned" not in tab.run("document.title")
            assert tab.requests[0] == page.as_uri()
            assert [url for url in tab.requests[1:] if not url.startswith("data:")] == []
            assert tab.problems == []
            # Shown as text, where it was written.
            text = tab.run("document.getElementById('prompt-task-0').textContent")
            assert text.count("<script>document.title='owned'</script>") == 4
            assert "␀␛[31m⟨U+202E⟩" in tab.run("document.getElementById('prompt-task-1').textContent")
            assert tab.run("document.querySelectorAll('main script, main style, main img').length") == 0
            assert "360,000 more characters are not shown here. The whole answer is in generations.jsonl." in tab.run(
                "document.getElementById('prompt-task-2').textContent"
            )

    def test_search_and_filters(page, tmp_path):
        with browser(tmp_path) as tab:
            tab.open(page)
            every = [f"prompt-task-{n}" for n in range(TASKS + 1)]
            assert tab.shown(".case") == every
            tab.press("/")
            assert tab.run("document.activeElement.id") == "search"
            # A slash in the field is a slash.
            tab.write("/")
            tab.press("Escape")
            assert tab.shown(".case") == every
            tab.press("/")
            tab.write("TASK-1 double")
            assert tab.shown(".case") == ["prompt-task-1", *(f"prompt-task-{n}" for n in range(10, TASKS + 1))]
            assert tab.run("document.getElementById('count').textContent") == "6 of 15 prompts"
            tab.press("Escape")
            tab.press("/")
            tab.write("title='owned'")
            assert tab.shown(".case") == ["prompt-task-0", "prompt-task-1"]
            tab.press("Escape")
            assert tab.shown(".case") == every
            assert tab.run("document.getElementById('count').textContent") == ""

            choose = (
                "(s => {{ s.value = {1!r}; s.dispatchEvent(new Event('change')); }})(document.getElementById('by-{0}'))"
            )
            tab.run(choose.format("change", "gained"))
            assert tab.shown(".case") == [f"prompt-task-{n}" for n in range(TASKS) if n % 3 == 2] + ["prompt-task-14"]
            assert tab.run("document.getElementById('count').textContent") == "5 of 15 prompts"
            tab.run(choose.format("tested", "passed"))
            assert tab.shown(".case") == [f"prompt-task-{n}" for n in range(TASKS) if n % 3 == 2]
            tab.run(choose.format("tested", "failed"))
            assert tab.shown(".case") == []
            tab.run(choose.format("change", "same"))
            assert tab.shown(".case") == [f"prompt-task-{n}" for n in range(TASKS) if n % 3 == 1]

    def test_keys_walk_from_prompt_to_prompt(page, tmp_path):
        here = "document.activeElement.closest('.case')?.id"
        with browser(tmp_path) as tab:
            tab.open(page)
            for key, there in (("j", 0), ("j", 1), ("ArrowRight", 2), ("k", 1), ("ArrowLeft", 0), ("k", 0)):
                tab.press(key)
                assert tab.run(here) == f"prompt-task-{there}"
            closed = "document.querySelector('#prompt-task-0 > details').open"
            assert tab.run(closed) is False
            tab.press("Enter")
            tab.until(closed)
            tab.press("?")
            assert tab.run("document.getElementById('help').open") is True
            # Behind the dialog nothing moves.
            tab.press("j")
            tab.press("Escape")
            tab.until("!document.getElementById('help').open")
            assert tab.run(here) == "prompt-task-0"

    def test_what_changed_is_shown_and_hidden(page, tmp_path):
        with browser(tmp_path) as tab:
            tab.open(page)
            for _ in range(4):
                tab.press("j")
            tab.press("d")
            tab.until("document.querySelector('#prompt-task-3 .diff').open")
            lines = tab.run(
                "[...document.querySelectorAll('#prompt-task-3 .diff code > *')].map(e => [e.tagName, e.textContent])"
            )
            assert lines == [
                ["SPAN", "  one\n"], ["DEL", "− two\n"], ["INS", "+ 2 <b>bold</b>\n"], ["SPAN", "  three\n"],
                ["INS", "+ four\n"], ["SPAN", "  \n"],
            ]  # fmt: skip
            assert "+2 −1 lines" in tab.run("document.querySelector('#prompt-task-3 .diff summary').textContent")
            tab.press("d")
            tab.until("!document.querySelector('#prompt-task-3 .diff').open")

    def test_curves_say_their_values(page, tmp_path):
        with browser(tmp_path) as tab:
            tab.open(page)
            tab.run("document.querySelector('.chart').focus()")
            reading = "document.querySelector('.chart output').textContent"
            tab.press("ArrowRight")
            assert tab.run(reading) == "step 0: validation rows 1.600"
            for _ in range(4):
                tab.press("ArrowRight")
            assert "step 4: training rows 1.300" in tab.run(reading)
            assert "validation rows 1.400" in tab.run(reading)
            assert tab.run("document.querySelector('.cursor').getAttribute('visibility')") == "visible"

    def test_a_link_to_a_prompt_opens_it(page, tmp_path):
        with browser(tmp_path) as tab:
            tab.open(page)
            tab.run("document.querySelector('.more-rows').open = true")
            tab.run("document.querySelector('a[href=\"#prompt-task-7\"]').click()")
            tab.until("document.querySelector('#prompt-task-7 > details').open")

    @pytest.mark.parametrize("width", [320, 390])
    def test_a_phone_shows_all_without_scrolling_sideways(page, tmp_path, width):
        with browser(tmp_path) as tab:
            tab.open(page, width=width, height=800)
            tab.click("#open-all")
            tab.until("document.querySelectorAll('.case > details[open]').length === 15")
            tab.run("document.querySelectorAll('details').forEach(details => { details.open = true; })")
            assert tab.run("innerWidth") == width
            assert tab.run("document.documentElement.scrollWidth") <= width
            beyond = (
                "[...document.querySelectorAll('main *')]"
                ".filter(e => e.getClientRects().length && !e.closest('.unseen')"
                f" && e.getBoundingClientRect().right > {width} + 1"
                " && !e.parentElement.closest('.scroll, pre, table, svg')).map(e => e.outerHTML.slice(0, 80))"
            )
            assert tab.run(beyond) == []

    def test_in_the_dark_the_ground_is_dark_and_a_button_turns_it(page, tmp_path):
        ground = "getComputedStyle(document.body).backgroundColor"
        with browser(tmp_path) as tab:
            tab.open(page, dark=True)
            dark = tab.run(ground)
            tab.click("#theme")
            light = tab.run(ground)
        assert max(map(int, re.findall(r"\d+", dark)[:3])) < 60
        assert min(map(int, re.findall(r"\d+", light)[:3])) > 200

    def test_paper_shows_what_was_unfolded_and_no_controls(page, tmp_path):
        opened = "document.querySelectorAll('.case > details[open]').length"
        with browser(tmp_path) as tab:
            tab.open(page)
            assert tab.run(opened) == 0
            folded = tab.pages()
            tab.run("document.querySelectorAll('.case > details')[1].open = true")
            one = tab.pages()
            tab.click("#open-all")
            assert tab.run(opened) == TASKS + 1
            assert folded < tab.pages()
            assert folded <= one <= folded + 5
            tab.send("Emulation.setEmulatedMedia", media="print")
            tab.run("dispatchEvent(new Event('beforeprint'))")
            assert tab.run("document.querySelectorAll('.case details:not([open]):not(.diff)').length") == 0
            assert tab.shown(".tools, button, nav, dialog, .diff") == []
            assert len(tab.shown(".paper")) == 1
            assert len(tab.shown(".answer .body, .answer > .note")) == 3 * (TASKS + 1)

    def test_landmarks_headings_and_names(page, tmp_path):
        with browser(tmp_path) as tab:
            tab.open(page)
            tab.send("Accessibility.enable")
            nodes = tab.send("Accessibility.getFullAXTree")["nodes"]
        roles = {}
        for node in nodes:
            if not node.get("ignored"):
                roles.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
        assert {"main", "banner", "navigation", "contentinfo", "search"} <= roles.keys()
        assert len(roles["main"]) == 1
        for role in ("table", "img", "searchbox", "combobox", "button", "article", "region", "image"):
            assert all(name.strip() for name in roles.get(role, [])), (role, roles[role])
        levels = [
            int(next(p["value"]["value"] for p in node["properties"] if p["name"] == "level"))
            for node in nodes
            if not node.get("ignored") and node["role"]["value"] == "heading"
        ]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels)), levels
