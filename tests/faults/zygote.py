"""Starts the real command quickly, again and again: imports everything once, then forks a process for every order.

Reads orders as lines of JSON on standard input: `{"arguments": […], "environment": {…}, "output": PATH}` starts the
command and prints its process id; an empty line waits for it and prints how it ended.

What waits are there are shortened (the SDK's between two tries, ours between two looks at a batch); nothing else is
changed.
"""

from __future__ import annotations

import json
import os
import sys


def _prepare() -> None:
    import anthropic._base_client

    import mlx_distill.cli.collect
    import mlx_distill.collect.batch
    import mlx_distill.collect.run
    import mlx_distill.quality
    import mlx_distill.teachers.anthropic
    import mlx_distill.teachers.anthropic_batch

    anthropic._base_client.INITIAL_RETRY_DELAY = 0.01  # type: ignore[attr-defined]
    mlx_distill.collect.batch.POLL_SECONDS = (0.01, 0.05)


def _child(order: dict[str, object]) -> None:
    from mlx_distill.cli.main import main

    environment, arguments, output = order["environment"], order["arguments"], order["output"]
    assert isinstance(environment, dict)
    assert isinstance(arguments, list)
    os.environ.update(environment)
    handle = os.open(str(output), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    code = 1
    try:
        main(arguments)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    _prepare()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    child = 0
    while line := sys.stdin.readline():
        if line.strip():
            order = json.loads(line)
            child = os.fork()
            if child == 0:
                _child(order)
            answer = child
        else:
            _, status = os.waitpid(child, 0)
            answer = os.waitstatus_to_exitcode(status)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
