"""The loopback server as a process of its own, for benchmarks: `python -m tests.servers.serve --delay 0.1`.

Prints its address, serves until standard input ends, then prints what it saw as one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from tests.servers.messages_server import MessagesServer

_WORDS = "Sort the list, then walk it once from both ends. " * 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--delay", type=float, default=0.0, help="Seconds that an answer takes.")
    parser.add_argument("--looks", type=int, default=0, help="Looks at a batch before it has ended.")
    arguments = parser.parse_args()
    times: list[float] = []

    def note(event: str) -> None:
        if event in ("accepted", "answered"):
            times.append(time.monotonic())

    server = MessagesServer(
        delay=arguments.delay,
        looks=arguments.looks,
        keep_requests=False,
        answer=lambda prompt: f"{prompt}: {_WORDS}",
        on_event=note,
    )
    with server:
        print(server.url, flush=True)  # noqa: T201
        sys.stdin.read()
        billed = server.billed
    json.dump(
        {
            "seconds": max(times) - min(times) if times else 0.0,
            "accepted": sum(billed.values()),
            "twice": sum(times > 1 for times in billed.values()),
            "most_at_once": server.most_at_once,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
