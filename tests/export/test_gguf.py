"""What is written as a GGUF reads back as the model that it was made of; what cannot be said in one is refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Ggml
from gguf.quants import quantize
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers, processors

from mlx_distill.errors import ModelError, ResourceError
from mlx_distill.export.gguf import model_name, write_gguf
from mlx_distill.export.gguf_vocabulary import SAMPLES
from mlx_distill.models.gguf import convert_gguf
from mlx_distill.models.gguf_reader import GgufFile, read_gguf
from mlx_distill.models.gguf_vocabulary import TokenType, read_vocabulary
from mlx_distill.models.tokenizer import load_tokenizer
from tests.tiny import SPECIAL, Architecture, make_tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_DISTILL_CACHE", str(tmp_path / "cache"))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_config(model: Path, **settings: Any) -> None:
    edit(model / "config.json", lambda config: config.update(settings))


def edit_weights(model: Path, change: Callable[[dict[str, NDArray[Any]]], object]) -> None:
    weights = load_file(model / "model.safetensors")
    change(weights)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})


def halve(model: Path) -> Path:
    """Every weight as float16, so that none loses a bit."""
    edit_weights(model, lambda all_: all_.update({name: values.astype(np.float16) for name, values in all_.items()}))
    return model


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def require_same_weights(folder: Path, expected: dict[str, NDArray[Any]]) -> None:
    found = load_file(folder / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_round_trip_is_exact(tmp_path: Path, architecture: Architecture, tied: bool) -> None:
    model = halve(make_tiny_model(tmp_path / "model", architecture=architecture, layers=3, tied=tied))
    path = write_gguf(model, tmp_path / "out", kind="f16", name="Tiny")
    assert path == tmp_path / "out" / "Tiny.gguf"
    assert [file.name for file in path.parent.iterdir()] == ["Tiny.gguf"]
    back = convert_gguf(path)
    require_same_weights(back, load_file(model / "model.safetensors"))
    kept = "architectures model_type hidden_size intermediate_size num_hidden_layers num_attention_heads "
    kept += "num_key_value_heads max_position_embeddings rms_norm_eps rope_theta vocab_size tie_word_embeddings "
    kept += "eos_token_id pad_token_id hidden_act"
    before, after = config_of(model), config_of(back)
    assert {key: after[key] for key in kept.split()} == {key: before[key] for key in kept.split()}
    ours, theirs = load_tokenizer(back), load_tokenizer(model)
    assert ours.chat_template == theirs.chat_template
    for text in (*SAMPLES, "".join(SPECIAL) * 2, "e\u0301 \u00e9 \ufb01"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text


def test_shards_and_bfloat16_are_read(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", architecture="llama", layers=2)
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    # bfloat16 by hand: the upper half of each float32. What is left of it fits in float16 but for what is tiny.
    bits = {name: values.view(np.uint32) & np.uint32(0xFFFF0000) for name, values in weights.items()}
    for number, part in enumerate((sorted(bits)[::2], sorted(bits)[1::2])):
        _save_bfloat16({name: bits[name] for name in part}, model / f"model-0000{number + 1}-of-00002.safetensors")
    back = convert_gguf(write_gguf(model, tmp_path / "out", kind="f16"))
    require_same_weights(back, {name: values.view(np.float32).astype(np.float16) for name, values in bits.items()})


def _save_bfloat16(bits: dict[str, NDArray[np.uint32]], path: Path) -> None:
    head, data = {}, b""
    for name, values in bits.items():
        upper = (values >> np.uint32(16)).astype(np.uint16).tobytes()
        head[name] = {"dtype": "BF16", "shape": values.shape, "data_offsets": [len(data), len(data) + len(upper)]}
        data += upper
    encoded = json.dumps(head).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def test_biases_of_llama_go_the_way_of_their_weights(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", architecture="llama", layers=1)
    edit_config(model, attention_bias=True)
    random = np.random.default_rng(1)
    biases = {
        f"model.layers.0.self_attn.{part}_proj.bias": size for part, size in zip("qkvo", (64, 32, 32, 64), strict=True)
    }
    edit_weights(
        model, lambda all_: all_.update({n: random.standard_normal(s).astype(np.float32) for n, s in biases.items()})
    )
    halve(model)
    back = convert_gguf(write_gguf(model, tmp_path / "out", kind="f16"))
    require_same_weights(back, load_file(model / "model.safetensors"))
    assert config_of(back)["attention_bias"] is True


def test_q8_0_is_llama_cpps_own(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", architecture="qwen2", layers=1, tied=False)
    found = read_gguf(write_gguf(model, tmp_path / "out", kind="q8_0")).tensors
    weights = load_file(model / "model.safetensors")
    assert {tensor.type for tensor in found.values() if len(tensor.shape) == 2} == {"Q8_0"}
    assert {tensor.type for tensor in found.values() if len(tensor.shape) == 1} == {"F32"}
    for name, theirs in (
        ("token_embd", "model.embed_tokens"),
        ("output", "lm_head"),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj"),
    ):
        np.testing.assert_array_equal(found[f"{name}.weight"].raw, quantize(weights[f"{theirs}.weight"], Ggml.Q8_0))


def test_rows_of_no_whole_blocks_stay_float16(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=1, hidden=48)
    found = read_gguf(write_gguf(model, tmp_path / "out", kind="q8_0")).tensors
    assert found["blk.0.ffn_up.weight"].type == "F16"
    assert found["blk.0.ffn_down.weight"].type == "Q8_0"


def test_what_pads_the_embedding_is_no_token(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=1)
    edit_config(model, vocab_size=400)

    def pad(weights: dict[str, NDArray[Any]]) -> None:
        weights["model.embed_tokens.weight"] = np.pad(weights["model.embed_tokens.weight"], ((0, 16), (0, 0)))

    edit_weights(model, pad)
    path = write_gguf(model, tmp_path / "out", kind="f16")
    vocabulary = read_vocabulary(read_gguf(path))
    assert [at for at, kind in enumerate(vocabulary.types) if kind == TokenType.UNUSED] == list(range(384, 400))
    assert len(set(vocabulary.tokens)) == 400
    assert (
        load_tokenizer(convert_gguf(path))("a [PAD390]")["input_ids"]
        == load_tokenizer(model)("a [PAD390]")["input_ids"]
    )


def metadata(path: Path) -> GgufFile:
    return read_gguf(path)


def test_metadata_says_what_llama_cpp_asks_for(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "my model!" / "fused", layers=1)
    (model / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    end, other = (load_tokenizer(model).convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, other]}))
    path = write_gguf(model, tmp_path / "out", kind="q8_0")
    assert path.name == "my-model.gguf"
    found = metadata(path).metadata
    wanted = {
        "general.architecture": "qwen2",
        "general.name": "my-model",
        "general.license": "apache-2.0",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "qwen2.context_length": 2048,
        "qwen2.attention.key_length": 16,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.eot_token_id": other,
        "tokenizer.ggml.padding_token_id": other,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
    }
    assert {key: found.get(key) for key in wanted} == wanted
    # Read back, both still end an answer.
    generation = json.loads((convert_gguf(path) / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [end, other]


SCALINGS: list[dict[str, Any]] = [
    {"type": "linear", "rope_type": "linear", "factor": 2.0},
    {"type": "yarn", "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512},
    {
        "type": "llama3",
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["type"])
@pytest.mark.parametrize("named", ["rope_scaling", "rope_parameters"])
def test_rotary_settings_survive(tmp_path: Path, scaling: dict[str, Any], named: str) -> None:
    model = make_tiny_model(tmp_path / "model", architecture="llama", layers=1)
    stated = {key: value for key, value in scaling.items() if key != "type"}
    if named == "rope_scaling":
        edit_config(model, rope_theta=500000.0, rope_scaling=stated)
    else:  # As transformers 5 writes it.
        edit(model / "config.json", lambda config: config.pop("rope_theta"))
        edit_config(model, rope_parameters={"rope_theta": 500000.0, **stated})
    found = config_of(convert_gguf(write_gguf(model, tmp_path / "out", kind="f16")))
    assert (found["rope_theta"], found["rope_scaling"]) == (500000.0, scaling)


def set_pre_tokenizer(model: Path, expression: str) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    split = pre_tokenizers.Split(Regex(expression), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.save(str(model / "tokenizer.json"))


def prepend(model: Path, *tokens: str) -> None:
    """Have tokens put before every text."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    special = [(token, tokenizer.token_to_id(token)) for token in tokens]
    tokenizer.post_processor = processors.TemplateProcessing(single=[*tokens, "$A"], special_tokens=special)
    tokenizer.save(str(model / "tokenizer.json"))


def test_the_beginning_of_a_text_is_asked_of_the_tokenizer(tmp_path: Path) -> None:
    """Not of `add_bos_token`, which transformers ignores in many a tokenizer_config.json."""
    model = make_tiny_model(tmp_path / "model", layers=1)
    edit(model / "tokenizer_config.json", lambda config: config.update(bos_token="<|endoftext|>"))
    prepend(model, "<|endoftext|>")
    path = write_gguf(model, tmp_path / "out", kind="f16")
    assert metadata(path).metadata["tokenizer.ggml.add_bos_token"] is True
    assert load_tokenizer(convert_gguf(path))("a b")["input_ids"] == load_tokenizer(model)("a b")["input_ids"]


def strip_left(model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", normalized=False, special=True, lstrip=True)])
    tokenizer.save(str(model / "tokenizer.json"))


def put(name: str, shape: tuple[int, ...]) -> Callable[[Path], None]:
    return lambda model: edit_weights(model, lambda weights: weights.update({name: np.zeros(shape, np.float32)}))


def set_value(name: str, value: float) -> Callable[[Path], None]:
    return lambda model: edit_weights(model, lambda weights: weights[name].fill(value))


LAST = "model.norm.weight"

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "architecture": (lambda m: edit_config(m, model_type="mistral", architectures=["MistralForCausalLM"]), "'mistral'"),
    "classifier": (
        lambda m: edit_config(m, architectures=["Qwen2ForSequenceClassification"]),
        "SequenceClassification",
    ),
    "no architecture": (lambda m: edit_config(m, model_type="../../etc"), "'../../etc'"),
    "quantized": (lambda m: edit_config(m, quantization={"bits": 4, "group_size": 64}), "weights are quantized"),
    "window": (lambda m: edit_config(m, use_sliding_window=True), "sliding window"),
    "activation": (lambda m: edit_config(m, hidden_act="gelu"), "gelu"),
    "rope": (lambda m: edit_config(m, rope_scaling={"rope_type": "longrope", "factor": 4.0}), "longrope"),
    "llama3 unlike": (
        lambda m: edit_config(m, rope_scaling={**SCALINGS[2], "original_max_position_embeddings": 4096}),
        "unlike Llama 3",
    ),
    "size": (lambda m: edit_config(m, num_hidden_layers="2"), "num_hidden_layers is '2'"),
    "layers": (lambda m: edit_config(m, num_hidden_layers=2), "lacks the tensor blk.1.attn_norm.weight"),
    "experts": (put("model.layers.0.mlp.gate.weight", (4, 64)), "mlp.gate.weight"),
    "unknown tensor": (put("vision.patch.weight", (4, 64)), "vision.patch.weight"),
    "shape": (put("model.layers.0.mlp.up_proj.weight", (64, 64)), "ffn_up.weight is (64, 64)"),
    "no head": (lambda m: edit_config(m, tie_word_embeddings=False), "lacks the weight lm_head.weight"),
    "integers": (
        lambda m: edit_weights(m, lambda w: w.update({LAST: np.ones(64, np.int32)})),
        "model.norm.weight is of the type I32",
    ),
    "split": (lambda m: set_pre_tokenizer(m, r"\w+|\s+"), "splits text in a way"),
    "stripping": (strip_left, "other tokens"),
    "two before": (lambda m: prepend(m, "<|im_start|>", "<|im_end|>"), "bos and eos alone"),
    # Found while the file is being written.
    "overflow": (set_value("model.layers.0.mlp.up_proj.weight", 1e5), "does not fit in float16"),
    "no number": (set_value(LAST, np.nan), "no numbers"),
    "infinite": (set_value("model.layers.0.mlp.up_proj.weight", -np.inf), "no numbers"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_said_is_refused_and_nothing_is_left(tmp_path: Path, what: str) -> None:
    spoil, reason = REFUSED[what]
    # transformers' tokenizer for qwen2 splits and strips by its own rule, whatever tokenizer.json says.
    architecture: Architecture = "llama" if what in ("split", "stripping") else "qwen2"
    model = make_tiny_model(tmp_path / "model", architecture=architecture, layers=1)
    spoil(model)
    before = tmp_path / "out" / "model.gguf"
    before.parent.mkdir()
    before.write_bytes(b"what was there")
    with pytest.raises(ModelError) as refusal:
        write_gguf(model, tmp_path / "out", kind="f16", name="model")
    assert reason in refusal.value.message
    assert [path.name for path in before.parent.iterdir()] == [before.name]
    assert before.read_bytes() == b"what was there"


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=1)
    other = make_tiny_model(tmp_path / "other", layers=1, vocabulary=400)
    (model / "tokenizer.json").write_bytes((other / "tokenizer.json").read_bytes())
    with pytest.raises(ModelError, match="384 rows"):
        write_gguf(model, tmp_path / "out", kind="f16")


def test_q8_0_takes_what_float16_cannot(tmp_path: Path) -> None:
    """The hint of the refusal above."""
    model = make_tiny_model(tmp_path / "model", layers=1)
    set_value("model.layers.0.mlp.up_proj.weight", 1e5)(model)
    found = read_gguf(write_gguf(model, tmp_path / "out", kind="q8_0")).tensors["blk.0.ffn_up.weight"].values()
    np.testing.assert_allclose(found, 1e5, rtol=1e-3)


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_tiny_model(tmp_path / "model", layers=1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(ResourceError, match="needs"):
        write_gguf(model, tmp_path / "out", kind="f16")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("folder", "name"),
    [("runs/mine/fused", "mine"), ("mine", "mine"), ("mine/export/hf", "mine"), ("Qwen2.5-1.5B", "Qwen2.5-1.5B")],
)
def test_a_model_is_named_by_its_run(tmp_path: Path, folder: str, name: str) -> None:
    assert model_name(tmp_path / folder) == name


def test_memory_stays_at_one_tensor(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=16, hidden=256)
    write_gguf(model, tmp_path / "warm", kind="q8_0")  # What is imported and cached is not of the tensors.
    size = (model / "model.safetensors").stat().st_size
    largest = max(values.nbytes for values in load_file(model / "model.safetensors").values())
    assert size > 50 * largest
    tracemalloc.start()
    try:
        write_gguf(model, tmp_path / "out", kind="q8_0")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 * largest
