"""llama.cpp loads what is written as a GGUF, and says what MLX says: the same tokens, logits and answers."""

from __future__ import annotations

import http.client
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mlx_distill.agreement import Agreement, Observation, Probe, ProbeRow, agreement
from mlx_distill.errors import DependencyError, ModelError
from mlx_distill.export import gguf_tensors
from mlx_distill.export.gguf import write_gguf
from mlx_distill.export.gguf_vocabulary import SAMPLES
from mlx_distill.models.tokenizer import load_tokenizer
from mlx_distill.probing import make_probe
from tests.tiny import CORPUS, SPECIAL, Architecture, make_tiny_model

pytest.importorskip("xllamacpp")

from mlx_distill.backends.llama_cpp import LlamaCpp, observe_file

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

PROBE = Probe(
    rows=(
        ProbeRow(tokens=tuple(range(5, 45)), positions=(0, 1, 7, 20, 38)),
        ProbeRow(tokens=(300, 301, 17), positions=(1,)),
        ProbeRow(tokens=tuple(np.random.default_rng(0).integers(0, 384, 100).tolist()), positions=tuple(range(50, 99))),
    ),
    prompts=((9, 8, 7), (300, 20, 301, 44)),
    greedy_tokens=12,
)


def agree(model: Path, gguf: Path, probe: Probe, folder: Path) -> Agreement:
    from mlx_distill.backends.mlx.observing import observe_folder

    observe_folder(model, None, probe, folder / "mlx")
    observe_file(gguf, probe, folder / "llama")
    return agreement(probe, Observation.load(folder / "mlx"), Observation.load(folder / "llama"))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_logits_and_answers_are_mlxs(tmp_path: Path, architecture: Architecture, tied: bool) -> None:
    model = make_tiny_model(tmp_path / "model", architecture=architecture, layers=2, tied=tied)
    found = agree(model, write_gguf(model, tmp_path, kind="f16"), PROBE, tmp_path)
    assert found.positions == PROBE.positions
    # llama.cpp keeps weights, keys and values in float16: 1e-6 nats.
    assert found.kl < 1e-5
    assert found.same_choice == found.greedy_agreement == 1


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_q8_0_is_near_the_model(tmp_path: Path, architecture: Architecture) -> None:
    model = make_tiny_model(tmp_path / "model", architecture=architecture, layers=2, tied=False)
    found = agree(model, write_gguf(model, tmp_path, kind="q8_0"), PROBE, tmp_path)
    # What 8 bits lose, of weights and, in llama.cpp, of states: the choices of random logits may differ.
    assert 1e-5 < found.kl < 1e-3


def test_rows_that_are_not_interleaved_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the tests above would show nothing of it."""
    monkeypatch.setattr(gguf_tensors, "interleaved_rows", lambda rows, heads: np.arange(rows))
    model = make_tiny_model(tmp_path / "model", architecture="llama", layers=2)
    assert agree(model, write_gguf(model, tmp_path, kind="f16"), PROBE, tmp_path).kl > 1e-3


SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_llama_cpp_turns_positions_as_mlx_does(tmp_path: Path, kind: str) -> None:
    model = make_tiny_model(tmp_path / "model", architecture="llama", layers=2)
    config = json.loads((model / "config.json").read_text())
    plain = agree(model, write_gguf(model, tmp_path / "plain", kind="f16"), PROBE, tmp_path / "plain")
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 1e6, "rope_scaling": SCALINGS[kind]}))
    found = agree(model, write_gguf(model, tmp_path / "out", kind="f16"), PROBE, tmp_path / "out")
    assert found.kl < 1e-5
    # The scaling changes what the model says, or this would show nothing.
    assert abs(found.loss_reference - plain.loss_reference) > 1e-4


def byte_level(model: Path, split: Any, *, ignore_merges: bool = False, bos: bool = False) -> Path:
    """Give a model another tokenizer."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=381, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS, *SAMPLES, "12 123 1234 " * 20] * 4, trainer)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if bos:
        at = tokenizer.token_to_id("<|endoftext|>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["<|endoftext|>", "$A"], special_tokens=[("<|endoftext|>", at)]
        )
        path = model / "tokenizer_config.json"
        path.write_text(path.read_text().replace('"eos_token"', '"bos_token": "<|endoftext|>", "eos_token"'))
    tokenizer.save(str(model / "tokenizer.json"))
    return model


def split_by(expression: str) -> Any:
    split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


@pytest.mark.parametrize("pre", ["qwen2", "smollm", "gpt-2", "llama-bpe"])
def test_llama_cpp_reads_text_as_the_student_does(tmp_path: Path, pre: str) -> None:
    model = make_tiny_model(tmp_path / "model", architecture="llama", layers=1)
    if pre == "smollm":
        byte_level(model, DIGITS)
    elif pre == "gpt-2":
        byte_level(model, pre_tokenizers.ByteLevel(add_prefix_space=False))
    elif pre == "llama-bpe":
        byte_level(model, split_by(LLAMA3_SPLIT), ignore_merges=True, bos=True)
    tokenizer: Any = load_tokenizer(model)
    chat = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2 {{ }}"},
        {"role": "user", "content": "é"},
    ]
    with LlamaCpp(write_gguf(model, tmp_path, kind="f16")) as found:
        for text in SAMPLES:
            assert found.tokens(text) == tokenizer(text)["input_ids"], text
            assert found.tokens(text, special=False) == tokenizer(text, add_special_tokens=False)["input_ids"], text
        assert found.chat(chat) == tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def test_an_answer_ends_where_the_probe_says(tmp_path: Path) -> None:
    """And goes on past what ends it for llama.cpp alone."""
    model = make_tiny_model(tmp_path / "model", layers=1)
    with LlamaCpp(write_gguf(model, tmp_path, kind="f16")) as found:
        whole = found.answer((5, 6, 7), PROBE)
        assert len(whole) == PROBE.greedy_tokens
        cut = found.answer((5, 6, 7), PROBE.model_copy(update={"end_tokens": (whole[4],)}))
        assert cut == whole[: whole.index(whole[4])]
    # Now the same token is the model's own end, and no end of the probe.
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [whole[4]]}))
    with LlamaCpp(write_gguf(model, tmp_path, kind="f16", name="other")) as found:
        assert found.answer((5, 6, 7), PROBE) == whole


@pytest.fixture
def handler() -> Iterator[Any]:
    before = signal.getsignal(signal.SIGTERM)

    def own(number: int, frame: object) -> None:
        raise SystemExit(number)

    signal.signal(signal.SIGTERM, own)
    yield own
    signal.signal(signal.SIGTERM, before)


def test_interrupting_stays_pythons(tmp_path: Path, handler: Any) -> None:
    model = make_tiny_model(tmp_path / "model", layers=1)
    with LlamaCpp(write_gguf(model, tmp_path, kind="f16")):
        assert signal.getsignal(signal.SIGTERM) is handler
        with pytest.raises(SystemExit):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_its_port_is_for_nobody_else(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=1)
    with LlamaCpp(write_gguf(model, tmp_path, kind="f16")) as found:
        connection = http.client.HTTPConnection(found._address, timeout=10)
        connection.request("POST", "/tokenize", '{"content": "a"}', {"Content-Type": "application/json"})
        assert connection.getresponse().status == 401
        connection.close()


def test_what_llama_cpp_does_not_load_is_an_error_of_ours(tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match="could not load"):
        observe_file(path, PROBE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(DependencyError, match="xllamacpp is not installed") as error:
        observe_file(tmp_path / "any.gguf", PROBE, tmp_path / "out")
    assert "mlx-distill[llama-cpp]" in str(error.value)


@pytest.mark.slow
def test_smollm2_answers_as_on_mlx(tmp_path: Path, smollm2: Path) -> None:
    probe = make_probe(smollm2, None, greedy_tokens=16)
    probe = probe.model_copy(update={"rows": probe.rows[:3], "prompts": probe.prompts[:2]})
    gguf = write_gguf(smollm2, tmp_path, kind="f16", name="SmolLM2")
    found = agree(smollm2, gguf, probe, tmp_path)
    assert found.kl < 1e-4
    assert found.same_choice > 0.98
    assert found.greedy_agreement is not None and found.greedy_agreement > 0.9
