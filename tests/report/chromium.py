"""A Chromium without a window, driven over its debugging pipe: real keys, real clicks, what it logs and asks for."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "about:blank",
]  # fmt: skip
#: Keys that are not letters → their code and number.
_NAMED = {
    "Enter": ("Enter", 13),
    "Escape": ("Escape", 27),
    "ArrowRight": ("ArrowRight", 39),
    "ArrowLeft": ("ArrowLeft", 37),
}
_DEADLINE = 60.0


class Tab:
    """One page.

    Attributes:
        problems: What the page wrote to its console, and errors.
        requests: Every address that was asked for, the page's own included.
    """

    def __init__(self, ask: Any, session: str) -> None:
        self._ask = ask
        self._session = session
        self.problems: list[str] = []
        self.requests: list[str] = []

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        return self._ask(method, params, self._session)

    def hear(self, event: dict[str, Any]) -> None:
        params = event["params"]
        match event["method"]:
            case "Runtime.consoleAPICalled":
                self.problems.append(str([argument.get("value") for argument in params["args"]]))
            case "Runtime.exceptionThrown":
                self.problems.append(str(params["exceptionDetails"]))
            case "Log.entryAdded":
                self.problems.append(params["entry"]["text"])
            case "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])

    def run(self, script: str) -> Any:
        """The value of an expression; the page's policy does not hold for the debugger."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, page: Path, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Load a page at a window's size, as a phone where it is narrow."""
        mobile = width < 600
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=mobile)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=page.as_uri())
        self.until("document.readyState === 'complete' && location.protocol === 'file:'")

    def until(self, condition: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + _DEADLINE
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < end, f"never: {condition}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """A key, down and up, to whatever has the focus."""
        code, number = _NAMED.get(key, ("", ord(key.upper()) if len(key) == 1 else 0))
        text = {"text": "\r"} if key == "Enter" else {} if key in _NAMED else {"text": key}
        shared = {"key": key, "code": code, "windowsVirtualKeyCode": number}
        self.send("Input.dispatchKeyEvent", type="keyDown", **shared, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **shared)

    def write(self, text: str) -> None:
        """Text into what has the focus."""
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """The middle of an element, by a mouse."""
        place = f"document.querySelector({selector!r})"
        self.run(f"{place}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        x, y = self.run(f"(r => [r.x + r.width / 2, r.y + r.height / 2])({place}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def shown(self, selector: str) -> list[str]:
        """The ids of the elements that are laid out."""
        return self.run(
            f"[...document.querySelectorAll({selector!r})].filter(e => e.getClientRects().length).map(e => e.id)"
        )

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def pages(self) -> int:
        """How many sheets of paper the page takes."""
        return len(re.findall(rb"/Type\s*/Page\b", base64.b64decode(self.send("Page.printToPDF")["data"])))


@contextmanager
def browser(work: Path) -> Iterator[Tab]:
    """A browser of its own with one tab.

    Args:
        work: Where its profile goes.
    """
    assert CHROMIUM
    to_read, to_write = os.pipe()
    from_read, from_write = os.pipe()
    # The browser's ends are to be 3 and 4; up here neither covers the other.
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 20) for end in (to_read, from_write)]
    actions: list[Any] = [(os.POSIX_SPAWN_DUP2, end, number) for end, number in zip(ends, (3, 4), strict=True)]
    actions += [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
    command = [CHROMIUM, f"--user-data-dir={work / 'profile'}", *_FLAGS]
    process = os.posix_spawn(CHROMIUM, command, os.environ, file_actions=actions)
    for end in (to_read, from_write, *ends):
        os.close(end)
    number = 0
    tab: Tab | None = None
    try:
        with os.fdopen(from_read, "rb", buffering=0) as source, os.fdopen(to_write, "wb", buffering=0) as sink:
            rest = b""

            def message() -> dict[str, Any]:
                nonlocal rest
                while b"\0" not in rest:
                    piece = source.read(1 << 16)
                    assert piece, "the browser ended"
                    rest += piece
                first, _, rest = rest.partition(b"\0")
                return json.loads(first)

            def ask(method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
                nonlocal number
                number += 1
                told = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
                sink.write(json.dumps(told).encode() + b"\0")
                while (answer := message()).get("id") != number:
                    if tab and "method" in answer and answer.get("sessionId") == session:
                        tab.hear(answer)
                assert "error" not in answer, answer
                return answer["result"]

            target = ask("Target.createTarget", {"url": "about:blank"})["targetId"]
            session = ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
            tab = Tab(ask, session)
            for domain in ("Page", "Runtime", "Log", "Network"):
                tab.send(f"{domain}.enable")
            yield tab
    finally:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
