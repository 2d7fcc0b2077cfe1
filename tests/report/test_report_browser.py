"""The page in a real browser: no error in its console, no request that leaves it, nothing of an answer runs.

Collected only where a Chromium is on the path.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from functools import partial
from pathlib import Path

from mlx_distill.config import ReportConfig
from mlx_distill.report.run import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

HOSTILE = (
    "<script>document.title='owned'</script><img src='http://127.0.0.1:9/x.png' onerror=\"document.title='owned'\">\n\n"
    "![p](http://127.0.0.1:9/p.png) [l](javascript:alert(1)) </section></main><style>body{display:none}</style>\n\n"
    "```html\n<script>document.title='owned'</script>\n"
)


class Visit:
    """What a browser saw and did on a page."""

    def __init__(self, page: Path, work: Path) -> None:
        log, picture = work / "net.json", work / "page.png"
        flags = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            f"--user-data-dir={work / 'profile'}", f"--log-net-log={log}", "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--window-size=1280,1600",
            "--virtual-time-budget=3000",
        ]  # fmt: skip
        assert CHROMIUM
        ask = partial(subprocess.run, capture_output=True, text=True, timeout=120, check=True)
        dumped = ask([CHROMIUM, *flags, "--dump-dom", page.as_uri()])
        self.dom = dumped.stdout
        self.console = [line for line in dumped.stderr.splitlines() if "CONSOLE" in line]
        events = json.loads(log.read_text())["events"]
        # The browser's own errands carry no origin; those of a page do.
        asked = [event.get("params", {}) for event in events]
        urls = {p["url"] for p in asked if "url" in p and p.get("initiator", "not an origin") != "not an origin"}
        self.requests = sorted(url for url in urls if re.match(r"(https?|wss?|ftp):", url))
        self._screenshot = partial(ask, [CHROMIUM, *flags, f"--screenshot={picture}", page.as_uri()])
        self._picture = picture

    def picture(self) -> Path:
        """A screenshot of the page's first 1280 × 1600 pixels."""
        self._screenshot()
        return self._picture


if CHROMIUM:

    def test_the_page_works_alone_and_hostile_answers_do_nothing(project, tmp_path):
        made = project(answers={("task-0", "base"): HOSTILE, ("task-1", "distilled"): "line\n\n" * 200})
        visit = Visit(report(ReportConfig(comparison=made.write())).page, tmp_path)
        assert visit.console == []
        assert visit.requests == []
        assert "<title>demo: Distillation took the student" in visit.dom
        # The script ran: long answers are folded and the buttons are shown.
        assert 'class="body folded"' in visit.dom
        assert re.search(r'<button type="button" class="quiet" id="theme">(Dark|Light)</button>', visit.dom)

        from matplotlib.image import imread

        pixels = imread(visit.picture())
        assert pixels.shape[:2] == (1600, 1280)
        assert pixels[:, :, :3].std() > 0.05

    def test_the_visit_would_see_an_error_and_a_request(tmp_path):
        page = tmp_path / "bad.html"
        page.write_text(
            "<meta http-equiv='Content-Security-Policy' content=\"script-src 'none'\"><title>t</title>"
            "<script>document.title='owned'</script><img src='http://127.0.0.1:9/x.png'>"
        )
        visit = Visit(page, tmp_path)
        assert visit.console
        assert visit.requests == ["http://127.0.0.1:9/x.png"]

    def test_a_page_with_pieces_missing_works_too(project, read, tmp_path):
        page = tmp_path / "report.html"
        page.write_text(read(project(judges=(), with_run=False, contenders=("base",))).page)
        visit = Visit(page, tmp_path)
        assert visit.console == []
        assert "What is missing" in visit.dom
