"""Tasks as prompts: their hidden tests decide which answers are rows, and are seen nowhere else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_distill import pipeline
from mlx_distill.cli.main import main
from mlx_distill.collect.run import collect, estimate_from_spec
from mlx_distill.errors import InputError, TeacherError
from mlx_distill.evaluation import load_tasks, read_prompts, scoring
from mlx_distill.layout import DataFolder
from mlx_distill.progress import SILENT
from mlx_distill.prompts import load_prompts
from mlx_distill.recipe import load_recipe
from mlx_distill.records import Reply, Request
from tests.collect.sampled import Sampled, config_for, dropped, rows_of
from tests.evaluation.asked import QUICK, fenced
from tests.servers.chat_server import MODEL, Answer, ChatServer, completion

TRIPLE, NAMES, TALK = "Write `triple(n)`, three times a number.", "List the names in `people(name, age)`.", "Say when."

TASKS = f"""
format = 1
kind = "python"
family = "mine"
[[task]]
id = "triple"
difficulty = "easy"
prompt = "{TRIPLE}"
defines = ["triple"]
tests = '''
assert triple(70071) == 210213
assert triple(0) == 0
'''
reference = "def triple(n): return n + n + n"
[[task]]
id = "names"
kind = "sql"
difficulty = "easy"
prompt = "{NAMES}"
setup = "CREATE TABLE people (name TEXT, age INTEGER);"
reference = "SELECT name FROM people ORDER BY rowid"
case = [{{rows = "INSERT INTO people VALUES ('Zaphod', 200);", expected = "Zaphod"}}]
[[task]]
id = "talk"
kind = "open"
difficulty = "easy"
prompt = "{TALK}"
reference = "Slartibartfast."
"""

#: Of the tests and references, which nobody but the scorer sees.
SECRETS = ("70071", "210213", "Zaphod", "Slartibartfast", "n + n + n", "ORDER BY rowid", "CREATE TABLE people")

RIGHT = fenced("def triple(n):\n    return 3 * n")
WRONG = fenced("def triple(n):\n    return 2 * n\n\nassert triple(0) == 0")
LOOP = fenced("def triple(n):\n    while True:\n        pass")
LEAVES = fenced("import os\n\ndef triple(n):\n    os._exit(0)")
ANSWERS = {
    TRIPLE: [WRONG, LOOP, RIGHT, LEAVES, "Multiply by three.", fenced("triple = lambda n: n * 3")],
    NAMES: [fenced("SELECT age FROM people", "sql")] * 5 + [fenced("SELECT name FROM people", "sql")],
    TALK: [fenced("assert 1 == 2")] * 6,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(scoring, "LIMITS", QUICK)
    (tmp_path / "tasks.toml").write_text(TASKS, encoding="utf-8")
    return tmp_path


def holds_secrets(text: str) -> list[str]:
    return [secret for secret in SECRETS if secret in text]


async def test_hidden_tests_decide_and_stay_hidden(folder: Path) -> None:
    config = config_for(folder, "tasks.toml", 6, verify=True)
    teacher = Sampled(ANSWERS)
    manifest = await collect(config, teacher)
    assert rows_of(config) == [(TRIPLE, RIGHT), (TRIPLE, ANSWERS[TRIPLE][5]), (NAMES, ANSWERS[NAMES][5])]
    assert dropped(manifest) == {"failing tests": (9, ("triple", "names")), "failing code": (6, ("talk",))}
    found = manifest.verification
    assert found is not None
    assert (found.passed, found.failed, found.without_code) == (3, 15, 0)
    assert found.failing == ("triple", "names", "talk")
    assert found.isolation
    assert manifest.none_left == ("talk",)
    # Each is asked by its own id; a task is no variation of another.
    assert {(request.prompt_id, request.family) for request in teacher.asked} == {
        (name, name) for name in ("triple", "names", "talk")
    }
    assert holds_secrets(json.dumps([request.model_dump() for request in teacher.asked])) == []
    written = [path for path in config.out.rglob("*") if path.is_file()]
    assert DataFolder(config.out).manifest in written
    assert [(path.name, held) for path in written if (held := holds_secrets(path.read_bytes().decode("latin-1")))] == []


async def test_nothing_that_passes_is_told_with_what_to_do(folder: Path) -> None:
    answers = {TRIPLE: [WRONG], NAMES: ["No."], TALK: [fenced("assert 1 == 2")]}
    config = config_for(folder, "tasks.toml", 1, verify=True)
    with pytest.raises(TeacherError, match=r"train on \(1 failing code, 2 failing tests\)") as refused:
        await collect(config, Sampled(answers))
    assert refused.value.hint == "Ask for more --samples, or train on what fails, too:  --keep-failing"
    assert not DataFolder(config.out).manifest.exists()


async def test_failing_answers_are_rows_where_they_are_wanted_or_not_looked_for(folder: Path) -> None:
    answers = {TRIPLE: [WRONG], NAMES: ["No."], TALK: ["Now."]}
    kept = await collect(config_for(folder, "tasks.toml", 1, verify=True, keep_failing=True), Sampled(answers))
    assert (kept.rows["train"], dropped(kept), kept.none_left) == (3, {}, ())
    assert kept.verification is not None
    assert (kept.verification.failing, kept.verification.without_code) == (("triple", "names"), 1)
    unseen = await collect(config_for(folder, "tasks.toml", 1), Sampled({}))
    assert (unseen.rows["train"], unseen.verification) == (3, None)


async def test_an_answer_that_passes_is_not_a_duplicate_of_one_that_fails(folder: Path) -> None:
    long = "Three times a number is the number added to itself twice, which a product says in one step. " * 4
    answers = {TRIPLE: [long + WRONG, long + RIGHT], NAMES: ["No.", "No."], TALK: ["Now.", "Now."]}
    config = config_for(folder, "tasks.toml", 2, verify=True, duplicate_threshold=0.8)
    manifest = await collect(config, Sampled(answers))
    assert rows_of(config) == [(TRIPLE, long + RIGHT), (TALK, "Now.")]
    assert dropped(manifest) == {"failing tests": (3, ("triple", "names")), "duplicate": (1, ("talk",))}
    unverified = await collect(config.model_copy(update={"verify": False}), Sampled({}))
    assert "triple" in dropped(unverified)["duplicate"][1]


async def test_of_what_passes_the_shortest_is_chosen(folder: Path) -> None:
    config = config_for(folder, "tasks.toml", 6, verify=True, choose="shortest")
    manifest = await collect(config, Sampled(ANSWERS))
    shortest = min(RIGHT, ANSWERS[TRIPLE][5], key=len)
    assert rows_of(config) == [(TRIPLE, shortest), (NAMES, ANSWERS[NAMES][5])]
    assert dropped(manifest)["not chosen"] == (1, ("triple",))


async def test_tasks_that_change_under_a_collection_are_noticed(folder: Path) -> None:
    class Editor(Sampled):
        async def ask(self, request: Request) -> Reply:
            (folder / "tasks.toml").write_text(TASKS.replace("three times", "3 times"), encoding="utf-8")
            return await super().ask(request)

    answers = {TRIPLE: [RIGHT], NAMES: ["No."], TALK: ["Now."]}
    config = config_for(folder, "tasks.toml", 1, verify=True)
    with pytest.raises(InputError, match="the task triple was changed while it was collected"):
        await collect(config, Editor(answers))
    later = Sampled({TRIPLE.replace("three times", "3 times"): [RIGHT]})
    assert (await collect(config, later)).rows["train"] == 2
    assert len(later.asked) == 1


# What is for evaluation is not for training.


@pytest.mark.parametrize("name", ["strings.toml", "sql.toml", "show.toml"])
async def test_the_shipped_tasks_are_refused(tmp_path: Path, name: str) -> None:
    config = config_for(tmp_path, "p", 1).model_copy(update={"prompts": Path("data/eval") / name})
    teacher = Sampled({})
    with pytest.raises(InputError, match="belongs to the evaluation set, which is not for training"):
        await collect(config, teacher)
    with pytest.raises(InputError, match="evaluation set"):
        estimate_from_spec(config.model_copy(update={"teacher": "mlx:x"}))
    assert teacher.asked == []


async def test_copies_of_the_shipped_tasks_are_refused(tmp_path: Path) -> None:
    shipped = next(task for task in load_tasks() if task.objective)
    (tmp_path / "p.jsonl").write_text(
        json.dumps({"prompt": "Say when.", "id": "one"})
        + "\n"
        + json.dumps({"prompt": f"  {shipped.prompt.upper()}", "id": "two"}),
        encoding="utf-8",
    )
    with pytest.raises(InputError, match=f"prompt two is the task {shipped.id} of the evaluation set"):
        await collect(config_for(tmp_path, "p.jsonl", 1), Sampled({}))


async def test_tasks_are_held_against_prompts_and_prompts_against_tasks(folder: Path) -> None:
    (folder / "held.toml").write_text(
        TASKS.replace(TRIPLE, f"Please do this: {TRIPLE}").replace(NAMES, "A.").replace(TALK, "B."), encoding="utf-8"
    )
    answers = {TRIPLE: [RIGHT], NAMES: ["No."], TALK: ["Now."]}
    config = config_for(folder, "tasks.toml", 1, eval_prompts=str(folder / "held.toml"))
    assert (await collect(config, Sampled(answers))).contaminated == {"triple": "triple"}
    near = next(task for task in load_tasks() if task.id == "squeeze-vowels")
    (folder / "near.txt").write_text(f"Be kind and {near.prompt.strip()}\nSay when.\n", encoding="utf-8")
    teacher = Sampled({prompt.text: ["Now."] for prompt in load_prompts(folder / "near.txt")})
    config = config_for(folder, "near.txt", 1, eval_prompts="data/prompts/heldout.toml, builtin")
    manifest = await collect(config, teacher)
    assert list(manifest.contaminated.values()) == [near.id]
    assert manifest.held_out == ("data/prompts/heldout.toml", "builtin")
    assert manifest.none_left == ()


# By the commands.


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_prompts_of_tasks_are_expanded_without_their_tests(folder: Path) -> None:
    out = folder / "p.jsonl"
    told = run("prompts", folder / "tasks.toml", "--out", out)
    assert told.exit_code == 0
    assert "3 prompts in 3 families" in told.stdout
    assert f"collect --prompts {folder / 'tasks.toml'} --verify" in told.stdout
    assert load_prompts(out) == read_prompts(folder / "tasks.toml")
    assert holds_secrets(out.read_text(encoding="utf-8") + told.output) == []
    assert json.loads(run("prompts", folder / "tasks.toml", "--json").stdout)["tasks"] is True
    assert json.loads(run("prompts", out, "--json").stdout)["tasks"] is False


def test_a_dry_run_reckons_with_tasks(folder: Path) -> None:
    told = run("collect", "--prompts", folder / "tasks.toml", "--teacher", "anthropic:claude-sonnet-4-6", "--dry-run")
    assert told.exit_code == 0, told.output
    assert "3 requests" in told.stdout


def test_mistakes_in_either_kind_of_file_are_told(folder: Path) -> None:
    path = folder / "tasks.toml"
    path.write_text(TASKS.replace("defines", "defnes"), encoding="utf-8")
    assert "triple: defnes" in run("prompts", path).stderr
    path.write_text(TASKS + "[[prompt]]\n", encoding="utf-8")
    assert "prompt: Extra inputs" in run("prompts", path).stderr
    path.write_text("[[task]\n", encoding="utf-8")
    assert f"{path}:1: not valid TOML" in run("prompts", path).stderr


def test_rejection_sampling_with_a_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four samples a task; which sample a server's answer becomes does not matter."""
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    (folder / "two.toml").write_text(TASKS[: TASKS.index('[[task]]\nid = "talk"')], encoding="utf-8")
    good, bad = [RIGHT, fenced("triple = lambda n: n * 3")], [WRONG, "Three times."]
    with ChatServer() as server:
        server.answers.extend(Answer(body=completion(text)) for text in [*good, *bad, *bad, *bad])
        told = run(
            *("collect", "--prompts", folder / "two.toml", "--teacher", f"openai:{MODEL}", "--base-url", server.url),
            *("--out", folder / "out", "--samples", "4", "--temperature", "0.8", "--verify", "--concurrency", "1"),
            *("--valid-fraction", "0", "--test-fraction", "0", "--accept-terms", "--yes"),
        )
        assert told.exit_code == 0, told.output
        assert [body["temperature"] for _, body in server.requests] == [0.8] * 8
        assert holds_secrets(json.dumps([body for _, body in server.requests])) == []
    rows = rows_of(config_for(folder, "two.toml", 4))
    assert sorted(rows) == sorted((TRIPLE, text) for text in good)
    assert "Left out, failing tests: 6 (triple, names)." in told.stdout
    assert "Of 4 samples a prompt 1.0 passed on average." in told.stdout
    assert "No answer passed: names." in told.stdout
    assert holds_secrets(told.output) == []


def test_a_recipe_of_tasks_is_verified_by_their_tests(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    answers = {TRIPLE: RIGHT, NAMES: fenced("SELECT age FROM people", "sql"), TALK: "Now."}
    Path("answers.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in answers.items()),
        encoding="utf-8",
    )
    Path("recipe.toml").write_text(
        'name = "small"\n[prompts]\nfile = "tasks.toml"\n[compare]\nprompts = "p.txt"\n[collect]\nverify = true\n'
        'teacher = "recorded:answers.jsonl"\nvalid_fraction = 0\ntest_fraction = 0\n',
        encoding="utf-8",
    )
    recipe = load_recipe(Path("recipe.toml"))
    pipeline._prompts(recipe).run(SILENT)
    step = pipeline._collect(recipe)
    assert list(step.reads) == [Path("tasks.toml")]
    step.run(SILENT)
    config = config_for(folder, "tasks.toml", 1, out=folder / "data" / "small")
    assert rows_of(config) == [(TRIPLE, RIGHT), (TALK, "Now.")]
