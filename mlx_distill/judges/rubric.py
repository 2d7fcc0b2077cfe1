"""The offline judge: a rubric that scores what can be counted in an answer and what its code does when it runs.

It is not a model's opinion. It cannot tell a wise explanation from a fluent one, and rewards what reviewers usually
ask for: code that runs, checks that pass, named errors, docstrings and types, short functions, an answer that is
finished. Its scores compare contenders on the same prompts; they are no measure of quality in themselves.

**Formula.** Every dimension starts at 0, gets the points below, and is held between 0 and 10. "To 4" means up to 4
points, in proportion. A rationale lists what was found with the points it brought.

Python
    correctness     code 1, all of it parses 2, runs to its end with every function having a body 3, checks of its own
                    that passed to 4 (at three); where it fails, the share of its tests that passed to 1.5; where it
                    needs a known package that is not there, 1.5
    error_handling  parses 2, raises named exceptions 2, more than one 1, with a message 0.5, leaves early on odd input
                    1, handles named exceptions 1, exception classes of its own 0.5, cleans up by `with` or `finally` 1,
                    checks that errors are raised 1, text names failures and limits to 1.5; each bare `except` -2,
                    silenced exception -2, `except Exception` -1, `raise Exception` -1
    documentation   docstrings on public functions and classes to 3, types to 2, comment 1, text to 2 (at 45 words),
                    text before the code 1 and after it 1
    structure       function with a body 3, longest function to 2 (at most 60 lines), nesting to 1.5 (at most 3 deep),
                    names by convention 1, long lines not repeated to 1, no `global` 0.5, checks apart from the code 1
SQL, run on an empty in-memory SQLite database
    correctness     code 1, known statement 1, runs 5, rows of its own 1.5, rows returned 1.5; without a schema to run
                    on, 2 in place of those
    error_handling  code 2, constraints to 3, missing values treated to 2, text names failures and limits to 3
    documentation   comments to 2, words to 3, sentences to 1, and text as above
    structure       clauses at the start of a line to 4, lines to 2, no wide line 2, indentation 2
Java and Kotlin, neither compiled nor run, which the rationale says
    correctness     code 1, balanced brackets 3, declaration 2, check of its own 1.5
    error_handling  code 2, named exceptions and preconditions to 4, cases told apart to 2, text names failures to 2,
                    each handler that catches everything -1
    documentation   comments to 3, typed 1, sentences to 2, and text as above; structure as SQL
Explanations
    correctness     names what was asked about to 4 (at half of it), words to 2 (at 100), its code runs 3 with checks 1,
                    or has no code that can be run 1.5
    error_handling  names failures and limits to 6, words to 2, errors in its code to 2, or an example 1
    documentation   words to 5 (at 110), sentences to 2, example 2, headings, lists or tables 1
    structure       paragraphs to 4, sentences to 2, headings, list items and rows to 2, example 2
All
    completeness    ended by itself 4, fences closed 1, whole last sentence or block 1, names what was asked about to
                    1.5 (at half of it), code together with text (or words to) 1, the checks, tests, complexity,
                    alternative or errors that were asked for to 1.5; placeholders -2 each and functions without a body
                    -2 each, two of each counted; at most 6 where the code that was asked for does not run

**Then** times 0.8 where the token budget cut the answer (not completeness, which has lost 4 already); times 0.7 where
only the beginning of its Python parses (not correctness and completeness); at most 2 where code was asked for and there
is none; times 0.25 where it names less than a tenth of what was asked about; times 0.2 where its prose is not made of
sentences (`evidence.fluent`); times `evidence.freshness`, which is 0 for a loop. An empty answer has 0.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from mlx_distill.config import Confinement
from mlx_distill.execution import Limits
from mlx_distill.judges.base import DIMENSIONS, Case
from mlx_distill.judges.evidence import Evidence, gather
from mlx_distill.judges.points import Tally, tallies
from mlx_distill.progress import Progress
from mlx_distill.quality.verify import choose_isolation
from mlx_distill.records import DimensionScore, Verdict


class RubricJudge:
    """Scores answers by the rubric of this module. Equal answers to equal prompts get equal scores.

    Args:
        limits: What an answer's code may use.
        sandbox: Whether the operating system confines it.
    """

    name = "rubric"

    def __init__(self, limits: Limits | None = None, *, sandbox: bool = False) -> None:
        self._limits = limits or Limits()
        self._sandbox = sandbox

    @classmethod
    def confined(cls, sandbox: Confinement, progress: Progress) -> RubricJudge:
        """The rubric whose answers' code runs as settings say. Blocks while it is seen whether the sandbox holds.

        Raises:
            DependencyError, IsolationError: Programs cannot be run so.
        """
        with ThreadPoolExecutor() as pool:
            return cls(sandbox=choose_isolation(sandbox, pool=pool, progress=progress))

    async def score(self, case: Case) -> Verdict:
        """Score one answer; its Python or SQL runs in a child process meanwhile."""
        generation = case.generation
        evidence = await asyncio.to_thread(gather, generation, limits=self._limits, sandbox=self._sandbox)
        return Verdict(
            prompt_id=generation.prompt.id,
            contender=generation.contender,
            judge=self.name,
            answer_sha256=generation.answer_sha256,
            scores=rubric_scores(evidence),
        )

    async def close(self) -> None:
        """Nothing is held."""


def rubric_scores(evidence: Evidence) -> dict[str, DimensionScore]:
    """The five scores of an answer, by dimension id."""
    if not evidence.text.strip():
        return {name: DimensionScore(score=0, rationale="The answer is empty.") for name in DIMENSIONS}
    found = tallies(evidence)
    return {name: _settle(name, found[name], evidence) for name in DIMENSIONS}


def _settle(name: str, tally: Tally, evidence: Evidence) -> DimensionScore:
    score = min(10.0, max(0.0, tally.points))
    notes = list(tally.found)
    broken = evidence.language == "python" and (evidence.python is None or not evidence.python.whole)
    if broken and name not in ("correctness", "completeness"):
        score *= 0.7
        notes.append("not all of the code parses (x 0.7)")
    failed = evidence.execution is not None and not evidence.execution.passed
    if name == "completeness" and evidence.asked.code and failed and score > 6:
        score = 6.0
        notes.append("its code does not run to its end (at most 6)")
    if not evidence.finished and name != "completeness":
        score *= 0.8
        notes.append("cut by the token budget (x 0.8)")
    if evidence.asked.code and not evidence.language and score > 2:
        score = 2.0
        notes.append("code was asked for and there is none to judge (at most 2)")
    if evidence.coverage < 0.1:
        score *= 0.25
        notes.append("hardly names what the prompt is about (x 0.25)")
    if not evidence.fluent:
        score *= 0.2
        notes.append("its text is not made of sentences (x 0.2)")
    if evidence.freshness < 1:
        score *= evidence.freshness
        notes.append(f"repeats itself (x {evidence.freshness:.2f})")
    return DimensionScore(score=round(score, 1), rationale="; ".join(notes) + ".")
