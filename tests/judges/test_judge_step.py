"""The step `judge` and its command: verdicts kept as they come, reused, never mixed up, and shown for what they are."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_distill.cli.main import main
from mlx_distill.config import JudgeConfig
from mlx_distill.errors import ConfigError, FolderError, InputError, TeacherUnavailableError
from mlx_distill.judges.base import DIMENSIONS, Case
from mlx_distill.judges.jury import means
from mlx_distill.judges.llm import LlmJudge
from mlx_distill.judges.rubric import RubricJudge
from mlx_distill.judges.run import Judged, judge, judges_from_spec
from mlx_distill.layout import ComparisonFolder, append_row, lock, read_rows
from mlx_distill.records import Contender, DimensionScore, Generation, Prompt, Verdict

CONTENDERS: tuple[Contender, ...] = ("teacher", "base", "distilled")


def generation(prompt: str, contender: Contender, text: str, *, model: str = "m") -> Generation:
    return Generation(
        prompt=Prompt(id=prompt, family=prompt, text="Write a Python function that doubles a number."),
        contender=contender, model=model, text=text, stop="end", output_tokens=1, seconds=0, max_tokens=99,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> ComparisonFolder:
    """A comparison of two prompts and three contenders."""
    made = ComparisonFolder(tmp_path / "visuals" / "demo")
    made.root.mkdir(parents=True)
    for prompt in ("double", "halve"):
        for contender in CONTENDERS:
            append_row(made.generations, generation(prompt, contender, f"{contender} on {prompt}"))
    return made


class CountingJudge:
    """Gives a score by the length of the answer, and counts how often it was asked."""

    def __init__(self, name: str = "counting", fail_after: int | None = None, unread: tuple[str, ...] = ()) -> None:
        self.name, self.fail_after, self.unread = name, fail_after, unread
        self.asked: list[str] = []
        self.at_once = self.most_at_once = 0
        self.closed = False

    async def score(self, case: Case) -> Verdict:
        one = case.generation
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise TeacherUnavailableError("the key was refused.")
        self.asked.append(one.text)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.001)
        self.at_once -= 1
        read = one.text not in self.unread
        score = DimensionScore(score=len(one.text) % 10, rationale="By its length.")
        return Verdict(
            prompt_id=one.prompt.id, contender=one.contender, judge=self.name, answer_sha256=one.answer_sha256,
            scores=dict.fromkeys(DIMENSIONS, score) if read else {}, problem=None if read else "no JSON",
        )  # fmt: skip

    async def close(self) -> None:
        self.closed = True


def config(folder: ComparisonFolder, **values: int) -> JudgeConfig:
    return JudgeConfig(comparison=folder.root, **values)


def test_every_answer_gets_a_verdict_in_order_and_none_twice(folder: ComparisonFolder) -> None:
    first = CountingJudge()
    verdicts = judge(config(folder), first)
    assert [(v.prompt_id, v.contender) for v in verdicts] == [(p, c) for p in ("double", "halve") for c in CONTENDERS]
    assert first.closed
    assert sorted(read_rows(folder.verdicts, Verdict), key=repr) == sorted(verdicts, key=repr)
    again = CountingJudge()
    assert judge(config(folder), again) == verdicts
    assert again.asked == []
    assert again.closed


def test_concurrency_is_bounded(folder: ComparisonFolder) -> None:
    one = CountingJudge()
    judge(config(folder, concurrency=2), one)
    assert one.most_at_once == 2


def test_only_a_changed_answer_is_judged_again(folder: ComparisonFolder) -> None:
    judge(config(folder), CountingJudge())
    append_row(folder.generations, generation("halve", "base", "a new answer"))
    second = CountingJudge()
    verdicts = judge(config(folder), second)
    assert second.asked == ["a new answer"]
    assert len(verdicts) == 6
    assert generation("halve", "base", "a new answer").answer_sha256 in {v.answer_sha256 for v in verdicts}


def test_two_judges_share_the_file_and_not_their_verdicts(folder: ComparisonFolder) -> None:
    judge(config(folder), CountingJudge("one"))
    two = CountingJudge("two")
    assert {verdict.judge for verdict in judge(config(folder), two)} == {"two"}
    assert len(two.asked) == 6
    assert len(read_rows(folder.verdicts, Verdict)) == 12


def test_an_unread_verdict_is_asked_for_again_and_the_later_counts(folder: ComparisonFolder) -> None:
    text = "base on halve"
    first = judge(config(folder), CountingJudge(unread=(text,)))
    assert [verdict.problem for verdict in first if not verdict.scores] == ["no JSON"]
    second = CountingJudge()
    verdicts = judge(config(folder), second)
    assert second.asked == [text]
    assert all(verdict.scores for verdict in verdicts)


def test_what_was_received_before_a_failure_is_kept(folder: ComparisonFolder) -> None:
    failing = CountingJudge(fail_after=4)
    with pytest.raises(TeacherUnavailableError):
        judge(config(folder, concurrency=1), failing)
    assert failing.closed
    assert len(read_rows(folder.verdicts, Verdict)) == 4
    rest = CountingJudge()
    judge(config(folder), rest)
    assert len(rest.asked) == 2


def test_a_torn_line_is_dropped_and_a_broken_one_is_named(folder: ComparisonFolder) -> None:
    judge(config(folder), CountingJudge())
    content = folder.verdicts.read_bytes()
    folder.verdicts.write_bytes(content[:-20])
    again = CountingJudge()
    assert len(judge(config(folder), again)) == 6
    assert len(again.asked) == 1
    assert len(read_rows(folder.verdicts, Verdict)) == 6
    folder.verdicts.write_bytes(b"{}\n" + content)
    with pytest.raises(InputError, match=r"verdicts\.jsonl:1"):
        judge(config(folder), CountingJudge())


def test_a_folder_in_use_is_refused(folder: ComparisonFolder) -> None:
    with lock(folder.root), pytest.raises(FolderError):
        judge(config(folder), CountingJudge())


def test_no_answers_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no answers"):
        judge(JudgeConfig(comparison=tmp_path / "nowhere"), CountingJudge())
    assert not (tmp_path / "nowhere").exists()
    empty = ComparisonFolder(tmp_path)
    empty.generations.write_text("")
    with pytest.raises(InputError, match="no answers"):
        judge(JudgeConfig(comparison=tmp_path), CountingJudge())


def test_judges_are_opened_by_name(tmp_path: Path) -> None:
    assert isinstance(judges_from_spec(JudgeConfig(comparison=tmp_path))[0], RubricJudge)
    recorded = tmp_path / "answers.jsonl"
    recorded.write_text('{"prompt": "a", "answer": "b"}\n')
    (opened,) = judges_from_spec(JudgeConfig(comparison=tmp_path, judge=f"recorded:{recorded}"))
    assert isinstance(opened, LlmJudge)
    assert opened.name == f"recorded:{recorded}"
    with pytest.raises(ConfigError):
        judges_from_spec(JudgeConfig(comparison=tmp_path, judge="rubrik"))


def test_means_leave_out_what_is_missing() -> None:
    def verdict(contender: Contender, score: float | None) -> Verdict:
        scores = {} if score is None else dict.fromkeys(DIMENSIONS, DimensionScore(score=score, rationale="r"))
        return Verdict(prompt_id="p", contender=contender, judge="j", answer_sha256="0", scores=scores)

    found = means([verdict("base", 4), verdict("base", 7), verdict("base", None), verdict("distilled", None)])
    assert found == {"base": {**dict.fromkeys(DIMENSIONS, 5.5), "overall": 5.5}}


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["judge", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_shows_a_table_and_says_what_judged(folder: ComparisonFolder) -> None:
    code, output, errors = run(str(folder.root))
    assert code == 0, errors
    lines = output.splitlines()
    assert lines[0] == "Judge: rubric (computed from the answers, not a model's opinion)."
    head = next(line for line in lines if "teacher" in line and "base" in line)
    assert head.split() == ["teacher", "base", "distilled"]
    for title in (*DIMENSIONS.values(), "Overall"):
        row = next(line for line in lines if line.startswith(title))
        assert len(row) == len(head)
    assert "child processes" in errors
    assert lines[-1] == f"Next:  mlx-distill report {folder.root}"


def test_the_command_answers_in_json(folder: ComparisonFolder) -> None:
    code, output, _ = run(str(folder.root), "--json")
    found = json.loads(output)
    assert code == 0
    assert (found["judge"], found["verdicts"], found["missing"], found["same_family"]) == ("rubric", 6, 0, False)
    assert set(found["scores"]) == set(CONTENDERS)
    assert set(found["scores"]["base"]) == {*DIMENSIONS, "overall"}


def test_missing_verdicts_are_counted_and_all_missing_fails(folder: ComparisonFolder, tmp_path: Path) -> None:
    recorded = tmp_path / "judge.jsonl"
    recorded.write_text('{"prompt": "something else", "answer": "b"}\n')
    code, output, _ = run(str(folder.root), "--judge", f"recorded:{recorded}")
    assert code == 1
    assert "6 of 6 verdicts are missing" in output
    assert "not as 0" in output


def test_a_judge_of_the_teachers_family_is_labelled(folder: ComparisonFolder) -> None:
    from mlx_distill.cli.judge import summarise

    generations = [generation("double", "teacher", "x", model="anthropic:claude-sonnet-4-6")]
    asked = JudgeConfig(comparison=folder.root)
    kin = summarise(Judged({"anthropic:claude-opus-4-6": []}, {}, {}), generations, asked)
    assert not callable(kin.lines)
    assert kin.data["same_family"] is True
    assert "teacher's own family, claude" in kin.lines[0]
    other = summarise(Judged({"openai:gpt-5.2": []}, {}, {}), generations, asked)
    assert other.data["same_family"] is False


def test_a_users_mistake_is_one_message(tmp_path: Path) -> None:
    code, _, errors = run(str(tmp_path / "nowhere"))
    assert code == 1
    assert "Traceback" not in errors
    assert "mlx-distill compare" in errors
