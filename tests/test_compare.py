"""The comparison: every contender's answer to every prompt, kept as it comes, made once."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_distill.backends.mlx.generation import Generator
from mlx_distill.compare.run import compare
from mlx_distill.config import CompareConfig
from mlx_distill.errors import FolderError, InputError, ModelError, TeacherError
from mlx_distill.layout import ComparisonFolder, RunFolder, lock, read_record, read_rows
from mlx_distill.progress import Bar
from mlx_distill.records import ComparisonRecord, Generation, Message
from mlx_distill.training.run import train
from tests.training.runs import ROOT, AtStep, environment, fused_run, make_data, settings

PROMPTS = {"first": "add two numbers", "second": "for item in items", "third": "class Node"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A finished and fused run. Do not write into it."""
    return fused_run(tmp_path_factory.mktemp("compared"), tiny_model)


def write_prompts(path: Path, prompts: dict[str, str]) -> Path:
    rows = [{"id": name, "family": name, "text": text} for name, text in prompts.items()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_answers(path: Path, prompts: dict[str, str]) -> Path:
    rows = [{"prompt": text, "answer": f"Réponse to {name}.\n"} for name, text in prompts.items()]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def config(run: Path, tmp_path: Path) -> CompareConfig:
    return CompareConfig(
        run=run,
        prompts=write_prompts(tmp_path / "prompts.jsonl", PROMPTS),
        teacher=f"recorded:{write_answers(tmp_path / 'answers.jsonl', PROMPTS)}",
        max_tokens=16,
        out=tmp_path / "visuals",
    )


def changed(config: CompareConfig, **changes: Any) -> CompareConfig:
    return CompareConfig.model_validate({**config.model_dump(), **changes})


def rows(config: CompareConfig) -> dict[tuple[str, str], Generation]:
    assert config.out is not None
    found = read_rows(ComparisonFolder(config.out).generations, Generation)
    by_key = {(row.contender, row.prompt.id): row for row in found}
    assert len(by_key) == len(found)
    return by_key


def said(config: CompareConfig) -> dict[tuple[str, str], tuple[str, str, int]]:
    return {key: (row.text, row.stop, row.output_tokens) for key, row in rows(config).items()}


class Loads(AtStep):
    """Notes which models were loaded to answer."""

    def __init__(self) -> None:
        super().__init__(-1, None)
        self.titles: list[str] = []

    def task(self, title: str, total: float | None = None, *, unit: str = "") -> Any:
        self.titles.append(title)
        return super().task(title, total, unit=unit)

    @property
    def loaded(self) -> list[str]:
        return [title.removeprefix("Loading ") for title in self.titles if title.startswith("Loading ")]


def test_every_contender_answers_every_prompt(config: CompareConfig, run: Path, tiny_model: Path) -> None:
    record = compare(config)
    found = rows(config)
    assert set(found) == {(c, p) for c in ("teacher", "base", "distilled") for p in PROMPTS}
    for contender, folder in (("base", tiny_model), ("distilled", run / "fused")):
        conversations = [[Message(role="user", content=text)] for text in PROMPTS.values()]
        answers = Generator(folder).answer(conversations, max_tokens=16, batch_size=8)
        expected = {list(PROMPTS)[answer.index]: (answer.text, answer.stop, answer.tokens) for answer in answers}
        assert {p: said(config)[contender, p] for p in PROMPTS} == expected
    assert {found["teacher", p].text for p in PROMPTS} == {f"Réponse to {p}.\n" for p in PROMPTS}
    assert any(found["base", p].text != found["distilled", p].text for p in PROMPTS)
    assert all(row.max_tokens == 16 and row.output_tokens <= 16 for row in found.values())
    assert all(row.prompt.text == PROMPTS[row.prompt.id] for row in found.values())
    assert config.out is not None
    assert record == read_record(ComparisonFolder(config.out).record, ComparisonRecord)
    assert (record.name, record.run, record.max_tokens, record.teacher) == ("visuals", str(run), 16, config.teacher)
    assert set(record.models) == set(record.seconds) == {"teacher", "base", "distilled"}
    assert set(record.tokens_per_second) == {"base", "distilled"}
    assert len(set(record.models.values())) == 3


def test_without_a_teacher_two_are_compared(config: CompareConfig) -> None:
    record = compare(changed(config, teacher=None))
    assert set(record.models) == {"base", "distilled"}
    assert {contender for contender, _ in rows(config)} == {"base", "distilled"}


def test_cut_answers_are_flagged(config: CompareConfig) -> None:
    """A random model hardly ever ends by itself within three tokens; the recorded teacher always does."""
    compare(changed(config, max_tokens=3))
    for (contender, _), row in rows(config).items():
        assert row.finished == (contender == "teacher")
        if contender != "teacher":
            assert (row.stop, row.output_tokens) == ("length", 3)


def test_the_folder_is_named_after_the_run(
    config: CompareConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert compare(changed(config, out=None, teacher=None)).name == "tuned"
    assert (tmp_path / "visuals" / "tuned" / "generations.jsonl").exists()


# Once


def test_a_second_call_asks_nobody(config: CompareConfig) -> None:
    compare(config)
    before, loads = said(config), Loads()
    compare(config, loads)
    assert loads.loaded == []
    assert said(config) == before


def test_another_budget_asks_all_again(config: CompareConfig) -> None:
    compare(config)
    loads = Loads()
    compare(changed(config, max_tokens=5), loads)
    assert loads.loaded == ["base", "distilled"]
    assert {row.max_tokens for row in rows(config).values()} == {5}
    assert len(rows(config)) == 9


def test_a_further_prompt_asks_for_it_alone(config: CompareConfig, tmp_path: Path) -> None:
    compare(config)
    before = said(config)
    more = {**PROMPTS, "fourth": "print a value"}
    write_prompts(tmp_path / "prompts.jsonl", more)
    write_answers(tmp_path / "answers.jsonl", more)
    compare(config)
    after = said(config)
    assert {key: value for key, value in after.items() if key[1] != "fourth"} == before
    assert len(after) == 12


def test_a_changed_or_removed_prompt_takes_its_answers_along(config: CompareConfig, tmp_path: Path) -> None:
    compare(config)
    before = said(config)
    fewer = {"first": "something else", "second": PROMPTS["second"]}
    write_prompts(tmp_path / "prompts.jsonl", fewer)
    write_answers(tmp_path / "answers.jsonl", fewer)
    compare(config)
    assert {row.prompt.id: row.prompt.text for row in rows(config).values()} == fewer
    assert said(config)["base", "second"] == before["base", "second"]
    assert said(config)["base", "first"] != before["base", "first"]


def test_another_teacher_leaves_the_models_answers(config: CompareConfig, tmp_path: Path) -> None:
    compare(config)
    answers = [{"prompt": text, "answer": "other"} for text in PROMPTS.values()]
    path = tmp_path / "others.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in answers), encoding="utf-8")
    loads = Loads()
    compare(changed(config, teacher=f"recorded:{path}"), loads)
    assert loads.loaded == []
    assert {row.text for (contender, _), row in rows(config).items() if contender == "teacher"} == {"other"}


def test_an_edited_record_is_not_taken_for_the_one_asked_before(config: CompareConfig, tmp_path: Path) -> None:
    compare(config)
    text = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").replace("Réponse", "Better")
    (tmp_path / "answers.jsonl").write_text(text, encoding="utf-8")
    compare(config)
    assert {row.text for (c, _), row in rows(config).items() if c == "teacher"} == {
        f"Better to {p}.\n" for p in PROMPTS
    }


@pytest.mark.parametrize("tail", ['{"format": 1, "prompt": {"id": "fi', "\0\0\0", '{"text": "R\u00e9'])
def test_a_torn_last_line_is_asked_again(config: CompareConfig, tail: str) -> None:
    compare(config)
    before = said(config)
    assert config.out is not None
    path = ComparisonFolder(config.out).generations
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + tail.encode()[:-1])
    compare(config)
    assert said(config) == before


# Ended in the middle


class Stop(AtStep):
    """Interrupts as soon as a number of answers are in the file."""

    def __init__(self, path: Path, answers: int) -> None:
        super().__init__(-1, None)
        self._path, self._answers = path, answers

    def task(self, title: str, total: float | None = None, *, unit: str = "") -> Any:
        stop = self

        class Watching(Bar):
            def advance(self, amount: float = 1, **fields: str) -> None:
                if stop._path.exists() and len(stop._path.read_bytes().splitlines()) >= stop._answers:
                    signal.raise_signal(signal.SIGINT)

        from contextlib import nullcontext

        return nullcontext(Watching())


@pytest.mark.parametrize("answers", [3, 4, 5, 7])
def test_what_was_answered_before_an_interruption_is_kept(config: CompareConfig, tmp_path: Path, answers: int) -> None:
    compare(changed(config, out=tmp_path / "whole", batch_size=1))
    config = changed(config, batch_size=1)
    assert config.out is not None
    path = ComparisonFolder(config.out).generations
    with pytest.raises(KeyboardInterrupt):
        compare(config, Stop(path, answers))
    kept = read_rows(path, Generation)
    assert len(kept) == answers
    loads = Loads()
    compare(config, loads)
    assert loads.loaded == (["base"] if answers < 6 else []) + ["distilled"]
    assert said(config) == said(changed(config, out=tmp_path / "whole"))


def test_a_killed_comparison_goes_on(config: CompareConfig, tmp_path: Path) -> None:
    whole = changed(config, out=tmp_path / "whole", batch_size=1, max_tokens=60)
    compare(whole)
    config = changed(config, batch_size=1, max_tokens=60)
    assert config.out is not None
    flags = [
        part
        for key, value in config.model_dump(mode="json", exclude_none=True).items()
        if key != "run"
        if value != ""
        for part in (f"--{key.replace('_', '-')}", str(value))
    ]
    generator = random.Random(1)
    path = ComparisonFolder(config.out).generations
    for kill in range(4):
        child = subprocess.Popen(
            [sys.executable, "-m", "mlx_distill", "compare", str(config.run), *flags],
            env=environment(),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith(("Base answers", "Distilled answers")):
                break
        time.sleep(generator.random() * 0.3)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        before = len(read_rows(path, Generation))
        if kill == 2:
            with path.open("ab") as file:
                file.write('{"text": "é'.encode()[:-1])
        assert before >= 3  # the teacher's
    compare(config)
    assert said(config) == said(whole)


# What is refused


def test_a_prompt_that_does_not_fit_is_refused_by_name(config: CompareConfig, tmp_path: Path) -> None:
    long = {"short": "add", "far-too-long": "x " * 3000}
    write_prompts(tmp_path / "prompts.jsonl", long)
    with pytest.raises(InputError, match=r"far-too-long: .* do not fit"):
        compare(changed(config, teacher=None))


def test_a_prompt_the_teacher_does_not_know_is_named_and_the_others_kept(config: CompareConfig, tmp_path: Path) -> None:
    write_prompts(tmp_path / "prompts.jsonl", {**PROMPTS, "unknown": "never recorded"})
    with pytest.raises(TeacherError, match="1 of 4 prompts unanswered: unknown"):
        compare(config)
    write_answers(tmp_path / "answers.jsonl", {**PROMPTS, "unknown": "never recorded"})
    compare(config)
    assert len(rows(config)) == 12


def test_another_runs_fused_model_is_refused(config: CompareConfig, tmp_path: Path, tiny_model: Path) -> None:
    other = tmp_path / "other"
    train(settings(make_data(tmp_path / "data"), tiny_model, other, seed=3))
    with pytest.raises(ModelError, match="fused from another adapter"):
        compare(changed(config, run=other, fused=config.run / "fused"))
    with pytest.raises(InputError, match="mlx-distill fuse"):
        compare(changed(config, run=other))


def test_a_fused_model_older_than_its_adapter_is_refused(config: CompareConfig, tmp_path: Path) -> None:
    copy = shutil.copytree(config.run, tmp_path / "copy")
    adapter = RunFolder(copy).adapter
    adapter.write_bytes(adapter.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ModelError, match="another adapter"):
        compare(changed(config, run=copy))


def test_a_folder_in_use_is_refused(config: CompareConfig) -> None:
    assert config.out is not None
    with lock(config.out), pytest.raises(FolderError, match="in use by process"):
        compare(config)


@pytest.mark.parametrize("content", ["", "\n\n", "{", '{"id": "a b", "family": "a", "text": "x"}'])
def test_broken_prompts_are_refused(config: CompareConfig, tmp_path: Path, content: str) -> None:
    (tmp_path / "prompts.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=r"prompts\.jsonl"):
        compare(config)


def test_a_broken_row_in_the_middle_is_named(config: CompareConfig) -> None:
    """Only a crash tears the last line; what else is broken was broken by someone, and is not thrown away unasked."""
    compare(config)
    assert config.out is not None
    path = ComparisonFolder(config.out).generations
    path.write_bytes(b'{"format": 1}\n' + path.read_bytes())
    with pytest.raises(InputError, match=r"generations\.jsonl:1: "):
        compare(config)
