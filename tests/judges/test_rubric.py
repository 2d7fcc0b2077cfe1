"""The rubric: good answers high, cut ones clearly lower, empty, looping and random ones at the bottom."""

from __future__ import annotations

import random
import tomllib
from pathlib import Path
from statistics import mean

import pytest

from mlx_distill.execution import Limits
from mlx_distill.judges.base import DIMENSIONS, Case
from mlx_distill.judges.evidence import fluent, freshness, read_prompt
from mlx_distill.judges.python_code import PythonCode, read_python
from mlx_distill.judges.rubric import RubricJudge
from mlx_distill.records import Generation, Prompt, StopReason

ANSWERS = Path(__file__).parent.parent.parent / "data" / "starter" / "answers"
TREE = "balanced-binary-tree"
#: One of each kind: Python with and without tests, SQL, Java, Kotlin, explanations with and without code.
KINDS = [
    TREE, "connection-pool", "ttl-cache-decorator", "free-time-slots--tests", "hash-ring--complexity",
    "sql-window-functions", "customers-without-orders", "java-lru-cache", "kotlin-expression-tree",
    "explain-isolation-levels", "explain-python-gil",
]  # fmt: skip


def starter(name: str) -> tuple[Prompt, str]:
    _, front, answer = (ANSWERS / f"{name}.md").read_text(encoding="utf-8").split("+++\n", 2)
    head = tomllib.loads(front)
    return Prompt(id=name, family=name.partition("--")[0], text=head["prompt"].strip()), answer


async def scores(answer: str, *, prompt: str = TREE, stop: StopReason = "end") -> dict[str, float]:
    generation = Generation(
        prompt=starter(prompt)[0], contender="base", model="m", text=answer, stop=stop,
        output_tokens=1, seconds=0, max_tokens=1024,
    )  # fmt: skip
    verdict = await RubricJudge(Limits(seconds=5)).score(Case(generation))
    assert verdict.judge == "rubric"
    assert verdict.answer_sha256 == generation.answer_sha256
    assert list(verdict.scores) == list(DIMENSIONS)
    assert all(score.rationale for score in verdict.scores.values())
    return {name: score.score for name, score in verdict.scores.items()}


@pytest.mark.parametrize("name", KINDS)
async def test_a_good_answer_scores_high_and_clearly_lower_when_cut(name: str) -> None:
    _, answer = starter(name)
    whole = await scores(answer, prompt=name)
    cut = await scores(answer[: len(answer) // 2], prompt=name, stop="length")
    assert 7.5 <= mean(whole.values()) <= 10
    assert mean(cut.values()) <= mean(whole.values()) - 2
    assert cut["completeness"] <= 6.5


@pytest.mark.parametrize("answer", ["", " \n\t\n", "\0\0\0", "\u200b"])
async def test_an_empty_answer_has_nothing(answer: str) -> None:
    assert max((await scores(answer)).values()) <= 2
    assert mean((await scores(answer)).values()) <= 1


LOOPS = {
    "sentence": "The function checks whether every node of the binary tree is height-balanced. " * 60,
    "code": "```python\n" + "def is_balanced(node):\n    return is_balanced(node.left)\n\n" * 80 + "```\n",
    "fences": "```\n" * 3000,
    "control": "\0\x1b[2J\x07" * 1000,
    "html": "<script>alert(1)</script>" * 200,
    "token": "tree " * 2000,
}


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("prompt", [TREE, "explain-hash-table", "sql-window-functions", "java-lru-cache"])
async def test_a_loop_is_at_the_bottom(kind: str, prompt: str) -> None:
    assert max((await scores(LOOPS[kind], prompt=prompt, stop="length")).values()) <= 2


@pytest.mark.parametrize("prompt", [TREE, "explain-hash-table", "sql-window-functions", "java-lru-cache"])
async def test_random_characters_and_words_are_at_the_bottom(prompt: str) -> None:
    chance = random.Random(7)
    characters = "".join(chr(chance.randint(33, 126)) for _ in range(2000))
    words = [word for name in KINDS for word in starter(name)[1].split()]
    salad = " ".join(chance.choice(words) for _ in range(300))
    for answer in (characters, salad):
        assert max((await scores(answer, prompt=prompt)).values()) <= 2


async def test_a_good_answer_that_ends_in_a_loop_loses_most() -> None:
    _, answer = starter(TREE)
    assert mean((await scores(answer + "\nThis function is good. " * 200, stop="length")).values()) < 4


WRONG = '''To check whether a binary tree is height-balanced, visit each node and compare the heights of its subtrees.

```python
class Node:
    """A node of a binary tree."""

    def __init__(self, value: int, left: "Node | None" = None, right: "Node | None" = None) -> None:
        self.value, self.left, self.right = value, left, right


def is_balanced(root: Node | None) -> bool:
    """Return whether the tree is balanced at every node."""
    if root is None:
        return True
    return abs(height(root.left) - height(root.right)) <= 1 and is_balanced(root.left)


print(is_balanced(Node(1, Node(2), Node(3))))
```

It visits every node once, so the time is O(n). An empty tree is balanced.
'''


async def test_fluent_code_that_does_not_run_is_not_correct() -> None:
    found = await scores(WRONG)
    assert found["correctness"] <= 3
    assert found["completeness"] <= 6
    working = WRONG.replace("height(root.left) - height(root.right)", "0")
    assert (await scores(working))["correctness"] > found["correctness"]


async def test_failing_tests_cost_correctness() -> None:
    answer = "The heights of the subtrees at every node are compared.\n\n```python\n{}\n```\nDone.\n"
    code = "def is_balanced(root):\n    return {}\n\n\ndef test_chain():\n    assert is_balanced('chain') == False\n"
    right, wrong = [await scores(answer.format(code.format(value))) for value in ("False", "True")]
    assert right["correctness"] >= 8
    assert wrong["correctness"] <= 3


async def test_a_stub_is_neither_correct_nor_complete() -> None:
    found = await scores(
        "The binary tree:\n\n```python\ndef is_balanced(root):\n    # TODO: implement this\n    pass\n```\n"
    )
    assert found["correctness"] <= 3
    assert found["completeness"] <= 2
    assert found["structure"] <= 1


async def test_trivial_checks_do_not_count() -> None:
    code = "```python\ndef is_balanced(root):\n    return root\n\n\n{}\n```\nThe tree node heights.\n"
    fake = await scores(code.format("assert True\nassert 1\nassert 'balanced'"))
    real = await scores(code.format("assert is_balanced(1) == 1\nassert not is_balanced(0)"))
    assert real["correctness"] >= fake["correctness"] + 2


async def test_a_known_package_that_is_missing_is_not_held_to_be_wrong_code() -> None:
    answer = "The binary tree heights at every node:\n\n```python\nimport {}\n\n\ndef f():\n    return 1\n```\nDone.\n"
    known, invented = [await scores(answer.format(name)) for name in ("numpy", "binary_tree_tools")]
    assert known["correctness"] > invented["correctness"]


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("except ValueError:\n        return None", "except:\n        pass"),
        ("except ValueError:\n        return None", "except Exception:\n        return None"),
        (
            "except ValueError as error:\n        raise KeyError('no such node') from error",
            "except ValueError:\n        pass",
        ),
    ],
)
async def test_error_handling_knows_bad_habits(better: str, worse: str) -> None:
    code = "def node(tree):\n    try:\n        return int(tree)\n    {}\n"
    answer = f"```python\n{code}```\nThe height of a binary tree node.\n"
    found = [(await scores(answer.format(handler)))["error_handling"] for handler in (better, worse)]
    assert found[0] > found[1]


async def test_documentation_counts_docstrings_types_and_text() -> None:
    bare = "```python\ndef height(node):\n    return 1 if node else 0\n```\n"
    typed = bare.replace("(node):", "(node: object) -> int:")
    documented = typed.replace("int:\n", 'int:\n    """Return the height of a balanced binary tree."""\n')
    explained = f"The height decides whether a binary tree is balanced.\n\n{documented}\nEvery node counts once.\n"
    found = [(await scores(answer))["documentation"] for answer in (bare, typed, documented, explained)]
    assert found == sorted(set(found))


async def test_structure_dislikes_deep_long_and_repeated_code() -> None:
    flat = "def check_tree(node):\n    return node\n"
    deep = (
        "def check_tree(node):\n"
        + "".join("    " * d + "if node:\n" for d in range(1, 8))
        + "    " * 8
        + "return node\n"
    )
    long = (
        "def check_tree(node):\n" + "".join(f"    value_{n} = node + {n}\n" for n in range(130)) + "    return node\n"
    )
    wrong = "def CheckTree(node):\n    global result_of_tree\n    result_of_tree = node\n"
    found = [
        (await scores(f"The binary tree.\n```python\n{code}```\n"))["structure"] for code in (flat, deep, long, wrong)
    ]
    assert all(found[0] > other for other in found[1:])


async def test_what_was_asked_for_has_to_be_there() -> None:
    name = "hash-ring--complexity"
    answer = starter(name)[1]
    full, silent = [await scores(text, prompt=name) for text in (answer, answer.replace("O(", "some ("))]
    assert full["completeness"] > silent["completeness"]
    name = "hash-ring--tests"
    code = (
        "```python\nclass HashRing:\n    def lookup(self, key: str) -> str:\n        return key\n{}```\nThe server.\n"
    )
    tests = "\n\ndef test_lookup() -> None:\n    assert HashRing().lookup('a') == 'a'\n"
    full, silent = [await scores(code.format(part), prompt=name) for part in (tests, "")]
    assert full["completeness"] > silent["completeness"]


async def test_the_wrong_language_is_no_answer() -> None:
    java = "The balanced tree:\n```java\nclass A { boolean isBalanced(Object node) { return true; } }\n```\nDone.\n"
    assert (await scores(java))["correctness"] <= 1
    rust = "The balanced tree, every node:\n```rust\nfn main() {}\n```\nDone.\n"
    assert (await scores(rust))["correctness"] <= 1
    prose = "Compute the heights of the left and right subtree at every node of the binary tree, and compare them."
    assert max((await scores(prose)).values()) <= 2


async def test_sql_has_to_run() -> None:
    answer = (
        "Rank the sales of each region by amount, with a running total in date order.\n\n```sql\n"
        "CREATE TABLE sales (id INTEGER PRIMARY KEY, region TEXT NOT NULL, amount INTEGER);\n"
        "INSERT INTO sales VALUES (1, 'North', 5);\n"
        "SELECT region, {} OVER (PARTITION BY region ORDER BY amount) FROM sales;\n"
        "```\n\nTies share a rank.\n"
    )
    right, wrong = [await scores(answer.format(f), prompt="sql-window-functions") for f in ("RANK()", "RANKING()")]
    assert right["correctness"] == 10
    assert wrong["correctness"] <= 2


async def test_code_that_is_not_run_says_so_and_cannot_be_perfect() -> None:
    prompt, answer = starter("java-lru-cache")
    generation = Generation(
        prompt=prompt, contender="teacher", model="m", text=answer, stop="end", output_tokens=1, seconds=0, max_tokens=9
    )
    verdict = await RubricJudge().score(Case(generation))
    assert verdict.scores["correctness"].score <= 7.5
    assert "not compiled or run" in verdict.scores["correctness"].rationale
    broken = answer.replace("}", "", 1)
    assert (await scores(broken, prompt="java-lru-cache"))["correctness"] <= 4.5


async def test_the_same_answer_has_the_same_scores_whoever_wrote_it() -> None:
    prompt, answer = starter(TREE)
    verdicts = [
        await RubricJudge().score(
            Case(Generation(prompt=prompt, contender=contender, model=model, text=answer, stop="end",
                            output_tokens=n, seconds=n, max_tokens=9))
        )
        for contender, model, n in (("teacher", "a", 1), ("base", "b", 2), ("distilled", "c", 3))
    ]  # fmt: skip
    assert verdicts[0].scores == verdicts[1].scores == verdicts[2].scores


@pytest.mark.parametrize(
    "answer",
    ["```python\n" + "while True:\n    print('x' * 1000)\n" + "```\n", "```python\nwhile True: pass\n```\n",
     "```python\n" + "(" * 50_000 + "\n```\n", "```python\n" + "-" * 100_000 + "1\n```\n",
     "```python\nx = 1" + " + 1" * 50_000 + "\n```\n", "word " * 100_000 + "`" * 100_000,
     "```sql\nWITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT * FROM n;\n```\n"],
    ids=["floods", "loops", "brackets", "minus", "plus", "long", "sql"],
)  # fmt: skip
async def test_hostile_answers_are_judged_and_score_low(answer: str) -> None:
    assert mean((await scores(answer)).values()) < 4


# ---- the measures it rests on


def code_of(source: str) -> PythonCode:
    found = read_python(source)
    assert found is not None
    return found


def test_python_facts() -> None:
    code = code_of('''
import unittest


class TreeError(ValueError):
    """Bad tree."""


class Reader(Protocol):
    def read(self) -> str: ...


async def load(path: str, *, strict: bool = True) -> str:
    """Load it."""
    if not path:
        raise TreeError("no path")  # early
    with open(path) as file:
        for line in file:
            if line:
                return line
            elif strict:
                raise Exception("bad")
    return ""


class TestLoad(unittest.TestCase):
    def setUp(self): self.x = 1
    def test_bad(self):
        with self.assertRaises(TreeError):
            load("")
        self.assertEqual(self.x, 1)
        self.assertTrue(True)
''')
    load = next(function for function in code.functions if function.name == "load")
    assert (load.documented, load.annotated, load.depth, load.public) == (True, 1.0, 3, True)
    assert {function.name for function in code.functions if function.public} == {"load", "read"}
    assert not any(function.placeholder for function in code.functions)
    assert (code.whole, code.classes, code.documented_classes, code.custom_exceptions) == (True, 2, 1, 1)
    assert (code.raises, code.generic_raises, code.messages, code.cleanups, code.error_checks) == (1, 1, 2, 2, 1)
    assert (code.checks, code.comments, code.badly_named) == (2, 1, ())


def test_a_broken_end_leaves_the_beginning() -> None:
    code = code_of("def f():\n    return 1\n\n\ndef g(:\n    ret")
    assert not code.whole
    assert [function.name for function in code.functions] == ["f"]
    assert read_python("def f(:") is None
    assert read_python("") is None


def test_freshness_and_fluency_keep_good_answers_and_drop_loops() -> None:
    for name in KINDS:
        _, answer = starter(name)
        assert freshness(answer) == 1
        assert fluent(answer)
    assert freshness("again and again and " * 100) == 0
    assert freshness("") == 1
    assert not fluent("the of the is cat the and sat the on")


def test_prompts_are_read() -> None:
    tree = read_prompt(starter(TREE)[0].text)
    assert (tree.language, tree.code) == ("python", True)
    assert {"binary", "tree"} <= tree.terms
    explain = read_prompt(starter("explain-isolation-levels")[0].text)
    assert not explain.code
    tests = read_prompt(
        "Write Java for `LruCache`.\n\nInclude a small set of unit tests that cover the normal and the edge cases."
    )
    assert (tests.language, tests.tests, tests.complexity) == ("java", True, False)
    assert "lrucache" in tests.terms
