"""What llama.cpp says of a GGUF: tokens, chat, logits and greedy answers, through the package xllamacpp.

The package gives llama.cpp's server, not its library: it listens on a port of this machine that it chooses itself,
with a key that is made anew, for as long as it is used. Such a server gives no logits of a prompt, but the final
hidden state of every token; the logits here are those states by the file's own output matrix. The greedy answers are
llama.cpp's alone, its output matrix included.

Writes: FOLDER/{logits.npy,greedy.json}, where it is told to.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import signal
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from mlx_distill.agreement import ObservationWriter, Probe
from mlx_distill.errors import DependencyError, ModelError
from mlx_distill.models.gguf_reader import GgufTensor, read_gguf

#: Seconds that an answer to one request may take.
_PATIENCE = 600

#: Rows of the output matrix in float32 at once: of a model of 2,048, 64 MB.
_ROWS = 8192

#: llama.cpp takes no fewer tokens at once.
_LEAST_BATCH = 32

#: Greedy, whatever a model's own settings for writing are.
_GREEDY: Mapping[str, Any] = {
    "temperature": 0,
    "top_k": 1,
    "samplers": ["top_k"],
    "cache_prompt": False,
    "return_tokens": True,
}


def observe_file(gguf: Path, probe: Probe, out: Path) -> None:
    """Load a GGUF and write what it says.

    Args:
        gguf: The file.
        out: Made where it is not there.

    Raises:
        DependencyError: xllamacpp is not installed.
        ModelError: llama.cpp does not load the file, or does not answer.
        OSError: It cannot be written, as on a full disk.
    """
    longest = [len(row.tokens) for row in probe.rows]
    longest += [len(prompt) + probe.greedy_tokens for prompt in probe.prompts]
    states, answers = [], []
    with LlamaCpp(gguf, context=max(longest, default=0) + 1) as model:
        states = [model.states(row.tokens)[list(row.positions)] for row in probe.rows]
        answers = [model.answer(prompt, probe) for prompt in probe.prompts]
    writer = ObservationWriter(out, probe)
    logits = _logits(np.concatenate(states), _output_matrix(gguf))
    for part in np.split(logits, np.cumsum([len(row.positions) for row in probe.rows])[:-1]):
        writer.add_row(part)
    writer.finish(answers)


class LlamaCpp:
    """A GGUF that llama.cpp has loaded; to be used in a `with` statement.

    Args:
        gguf: The file.
        context: Tokens that it must be able to see at once.

    Raises:
        DependencyError: xllamacpp is not installed.
        ModelError: llama.cpp does not load the file.
    """

    def __init__(self, gguf: Path, *, context: int = 2048) -> None:
        try:
            import xllamacpp
        except ImportError:
            raise DependencyError("xllamacpp", extra="llama-cpp") from None
        self._gguf = gguf
        self._key = secrets.token_urlsafe()
        params = xllamacpp.CommonParams()
        params.model.path = str(gguf)
        params.hostnames, params.port, params.api_keys = ["127.0.0.1"], 0, [self._key]
        params.embedding = True
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_NONE
        params.n_parallel = 1
        # States come of whole prompts, each in one batch.
        params.n_ctx = params.n_batch = params.n_ubatch = max(context, _LEAST_BATCH)
        params.warmup = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = _threads()
        params.ui = False
        params.verbosity = -1
        with _kept_signals():
            try:
                self._server: Any = xllamacpp.Server(params)
            except RuntimeError as error:
                raise ModelError(f"{gguf}: llama.cpp could not load this file ({error}).") from None
        self._address = self._server.listening_address.removeprefix("http://")
        # A server that is ended before its loop has begun waits for itself for ever.
        self.states((0,))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # It ends as the last reference to it goes.
        self._server = None

    def tokens(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a text, in which special tokens are read as such.

        Args:
            special: Whether bos and eos are added, where the file says so.
        """
        found = self._ask("/tokenize", {"content": text, "add_special": special, "parse_special": True})
        return [int(token) for token in found["tokens"]]

    def chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation as the file's chat template writes it, with the beginning of the answer."""
        return str(self._ask("/apply-template", {"messages": list(messages)})["prompt"])

    def states(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The final hidden states, after the last norm, (tokens, width)."""
        found = self._ask("/embedding", {"content": list(tokens), "embd_normalize": -1})
        states = np.array(found[0]["embedding"], np.float32)
        if states.ndim != 2 or len(states) != len(tokens):
            raise ModelError(f"{self._gguf}: llama.cpp gave states {states.shape} for {len(tokens)} tokens.")
        return states

    def answer(self, prompt: Sequence[int], probe: Probe) -> list[int]:
        """A greedy answer, without the token that ends it."""
        answer: list[int] = []
        while len(answer) < probe.greedy_tokens:
            # What ends an answer for llama.cpp may be no end for the probe: then it is asked to go on.
            request = {**_GREEDY, "prompt": [*prompt, *answer], "n_predict": probe.greedy_tokens - len(answer)}
            found = [int(token) for token in self._ask("/completion", request)["tokens"]]
            for at, token in enumerate(found):
                if token in probe.end_tokens:
                    return answer + found[:at]
            if not found:
                break
            answer += found
        return answer[: probe.greedy_tokens]

    def _ask(self, path: str, request: Mapping[str, Any]) -> Any:
        connection = http.client.HTTPConnection(self._address, timeout=_PATIENCE)
        head = {"Content-Type": "application/json", "Authorization": f"Bearer {self._key}"}
        try:
            connection.request("POST", path, json.dumps(request), head)
            response = connection.getresponse()
            content = response.read()
            if response.status != http.HTTPStatus.OK:
                raise ModelError(f"{self._gguf}: llama.cpp refused {path}: {content[:300].decode(errors='replace')}")
            return json.loads(content)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{self._gguf}: llama.cpp gave no answer to {path} ({error}).") from error
        finally:
            connection.close()


def _threads() -> int:
    """Of the CPU. They wait for each other spinning: one more than there are free cores costs a hundredfold."""
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    return max(1, int(asked) if asked.isdecimal() else (os.cpu_count() or 2) - 1)


@contextlib.contextmanager
def _kept_signals() -> Iterator[None]:
    """The server takes the signals that interrupt a program for its own; they are given back."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        # Only the main thread may, and only it is interrupted.
        with contextlib.suppress(ValueError):
            for number, handler in kept.items():
                signal.signal(number, handler)


def _output_matrix(gguf: Path) -> GgufTensor:
    tensors = read_gguf(gguf).tensors
    return tensors.get("output.weight") or tensors["token_embd.weight"]


def _logits(states: NDArray[np.float32], head: GgufTensor) -> NDArray[np.float32]:
    """(positions, vocabulary), of the states (positions, width)."""
    rows = head.shape[0]
    logits = np.empty((len(states), rows), np.float32)
    for start in range(0, rows, _ROWS):
        raw = head.raw[start : start + _ROWS]
        part = GgufTensor(head.name, head.type, (len(raw), *head.shape[1:]), raw)
        logits[:, start : start + _ROWS] = states @ part.values().T
    return logits
