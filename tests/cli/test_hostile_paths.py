"""Every command with paths that are not what they should be: one message, exit 1, no traceback."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_distill.cli.main import main


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


HOSTILE = (
    "nowhere",
    "folder",
    "file",
    "binary",
    *(f"{kind}{suffix}" for kind in ("binary", "empty", "folder") for suffix in (".toml", ".jsonl", ".txt", ".gguf")),
    "scalars.jsonl",
    "deep.jsonl",
    "deep.toml",
    "spa ce\nand 漢",
    "n" * 300,
    "file/below",
    "loop",
    "~nobody-of-this-name/x",
    "not-text-\udcff",
    "all-binary",
    "all-folders",
    "all-empty",
    "all-other-json",
    "-",
)

#: Where a hostile path can stand. The rest of each command line is in order.
SLOTS: dict[str, Callable[[str], list[str]]] = {
    "run": lambda path: ["run", path],
    "prompts": lambda path: ["prompts", path],
    "collect --prompts": lambda path: ["collect", "--prompts", path, "--teacher", "recorded:ok.jsonl", "--out", "o1"],
    "collect --teacher": lambda path: ["collect", "--prompts", "ok.txt", "--teacher", path, "--out", "o2"],
    "recorded": lambda path: ["collect", "--prompts", "ok.txt", "--teacher", f"recorded:{path}", "--out", "o3"],
    "mlx": lambda path: ["collect", "--prompts", "ok.txt", "--teacher", f"mlx:{path}", "--out", "o4"],
    "collect --out": lambda path: [
        "collect",
        "--prompts",
        "ok.txt",
        "--teacher",
        "recorded:other.jsonl",
        "--out",
        path,
    ],
    "train --data": lambda path: ["train", "--data", path, "--model", "tiny", "--run", "r1"],
    "train --model": lambda path: ["train", "--data", "data", "--model", path, "--run", "r2"],
    "train --run": lambda path: ["train", "--data", "all-empty", "--model", "tiny", "--run", path],
    "fuse": lambda path: ["fuse", path],
    "compare": lambda path: ["compare", path, "--prompts", "ok.txt"],
    "judge": lambda path: ["judge", path],
    "judge --judge": lambda path: ["judge", "nowhere", "--judge", path],
    "report": lambda path: ["report", path],
}

OUR_FILES = (
    *("run.json", "adapters.safetensors", "metrics.jsonl", "manifest.json", "ledger.db", "train.jsonl", "valid.jsonl"),
    *("comparison.json", "generations.jsonl", "verdicts.jsonl", "config.json", "tokenizer.json", ".lock"),
)


@pytest.fixture
def hostile_folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_DISTILL_CACHE", str(tmp_path / "cache"))
    junk = bytes(range(256)) * 20
    (tmp_path / "tiny").symlink_to(tiny_model)
    (tmp_path / "ok.txt").write_text("a\n", encoding="utf-8")
    (tmp_path / "ok.jsonl").write_text('{"prompt": "a", "answer": "b"}\n', encoding="utf-8")
    (tmp_path / "other.jsonl").write_text('{"prompt": "never asked", "answer": "b"}\n', encoding="utf-8")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a b c"}\n', encoding="utf-8")
    (tmp_path / "file").write_text("a sentence\n", encoding="utf-8")
    for suffix in ("", ".toml", ".jsonl", ".txt", ".gguf"):
        (tmp_path / f"binary{suffix}").write_bytes(junk)
        (tmp_path / f"empty{suffix}").touch()
        (tmp_path / f"folder{suffix}").mkdir()
    (tmp_path / "scalars.jsonl").write_text('[1]\n"x"\nnull\n', encoding="utf-8")
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n", encoding="utf-8")
    (tmp_path / "deep.toml").write_text("a = " + "[" * 100_000, encoding="utf-8")
    (tmp_path / "spa ce\nand 漢").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name in OUR_FILES:
        for folder in ("all-binary", "all-folders", "all-empty", "all-other-json"):
            (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / "all-binary" / name).write_bytes(junk)
        (tmp_path / "all-folders" / name).mkdir()
        (tmp_path / "all-empty" / name).touch()
        (tmp_path / "all-other-json" / name).write_text('{"a": 1}\n', encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("slot", SLOTS)
def test_hostile_paths_give_a_message_and_no_traceback(hostile_folder: Path, slot: str) -> None:
    for path in HOSTILE:
        arguments = SLOTS[slot](path)
        if arguments[:2] == ["prompts", "file"]:
            continue  # A sentence is a prompt.
        result = invoke(*arguments)
        assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
        assert result.exit_code == 1, (arguments, result.output)
        assert result.stdout == "" or arguments[0] == "collect", arguments
        *_, last = re.split(r"^Error: ", result.stderr, flags=re.MULTILINE)
        assert last.strip() or result.stdout, arguments
        assert "Traceback" not in result.output


def test_a_place_that_cannot_be_written_is_told(hostile_folder: Path) -> None:
    for path in ("folder", "folder.jsonl", "file/below", "loop/below", "n" * 300):
        result = invoke("prompts", "ok.txt", "--out", path)
        assert result.exit_code == 1, path
        assert "could not be written" in result.stderr or "is not a file" in result.stderr


def test_nothing_is_left_behind_by_what_failed(hostile_folder: Path) -> None:
    before = {path.relative_to(hostile_folder) for path in hostile_folder.rglob("*")}
    for slot in ("run", "prompts", "collect --prompts", "fuse", "compare", "report"):
        for path in ("nowhere", "binary.toml", "folder", "file/below"):
            invoke(*SLOTS[slot](path))
    after = {path.relative_to(hostile_folder) for path in hostile_folder.rglob("*")}
    assert {path for path in after - before if path.parts[0] not in ("nowhere", "folder")} == set()
