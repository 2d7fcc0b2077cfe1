"""Tasks with hidden tests, and what comes of the answers to them: scores that are nobody's opinion.

    tasks = load_tasks()                                # data/eval/, or files of your own
    outcomes = list(score_answers([(tasks[0], answer)], sandbox="auto"))      # passed, failed, timeout, ...
    pass_at_k(n=10, c=3, k=5)                           # unbiased

An answer's code runs in a child process within limits and, where there is one, in the system's sandbox; see
`mlx_distill.execution`. What a test expects never enters that process: it sees what is computed there, and the
comparison is made here. Code that leaves early, prints what it likes, redefines equality, or takes over its
interpreter cannot pass a test whose result it does not know. Two things are left open: the answer to a question of yes
or no can be guessed, and without a sandbox a program can read what the user can, the files of the tasks included.
"""

from mlx_distill.evaluation.human_eval import load_human_eval
from mlx_distill.evaluation.passing import mean_pass_at_k, pass_at_k
from mlx_distill.evaluation.scoring import score_answer, score_answers
from mlx_distill.evaluation.tasks import EvalTask, as_prompts, is_task_file, load_tasks, read_prompts, refuse_builtin
from mlx_distill.scores import Ending, Outcome

__all__ = [
    "Ending",
    "EvalTask",
    "Outcome",
    "as_prompts",
    "is_task_file",
    "load_human_eval",
    "load_tasks",
    "mean_pass_at_k",
    "pass_at_k",
    "read_prompts",
    "refuse_builtin",
    "score_answer",
    "score_answers",
]
