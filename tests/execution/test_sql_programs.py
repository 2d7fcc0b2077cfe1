"""SQL runs in order on an empty database and reaches nothing else."""

from __future__ import annotations

from pathlib import Path

from mlx_distill.execution import run_sql
from tests.execution.programs import QUICK


def test_sql_runs_in_order_on_an_empty_database() -> None:
    execution = run_sql("CREATE TABLE t (a, b); INSERT INTO t VALUES (1, 'x;y'), (2, NULL);\nSELECT * FROM t -- end")
    assert (execution.outcome, execution.statements, execution.stdout) == ("passed", 3, "1\tx;y\n2\tNULL\n")


def test_a_trigger_is_one_statement() -> None:
    script = (
        "CREATE TABLE t (a); CREATE TRIGGER r AFTER INSERT ON t BEGIN UPDATE t SET a = 2; UPDATE t SET a = a + 1; END;"
    )
    execution = run_sql(f"{script} INSERT INTO t VALUES (0); SELECT a FROM t;")
    assert (execution.outcome, execution.statements, execution.stdout) == ("passed", 4, "3\n")


def test_sql_that_is_wrong_endless_or_reaches_for_files_fails(tmp_path: Path) -> None:
    wrong = run_sql("SELECT 1; SELECT nothing FROM nowhere;")
    assert (wrong.outcome, wrong.error) == ("failed", "OperationalError")
    assert wrong.stderr.startswith("statement 2: ")
    endless = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n;"
    assert run_sql(endless, limits=QUICK).outcome == "timeout"
    target = tmp_path / "stolen.db"
    assert run_sql(f"ATTACH '{target}' AS other;").outcome == "failed"
    assert run_sql(f"VACUUM INTO '{target}';").outcome == "failed"
    assert not target.exists()
    assert run_sql("SELECT '\0';").outcome == "failed"
