"""The schema of a ledger, how one is opened, and what its database's errors mean to a user."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from mlx_distill.errors import FolderError, InputError, MlxDistillError, ResourceError

#: "mlxd": says that a SQLite file is a ledger of ours.
APPLICATION_ID = 0x6D6C7864

#: Statements that bring the schema from version N to N + 1, in order. Old entries are never edited.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE requests (
            key           TEXT PRIMARY KEY,
            prompt_id     TEXT NOT NULL,
            family        TEXT NOT NULL,
            teacher       TEXT NOT NULL,
            system        TEXT,
            messages      TEXT NOT NULL,
            max_tokens    INTEGER NOT NULL,
            state         TEXT NOT NULL DEFAULT 'planned'
                          CHECK (state IN ('planned', 'sent', 'answered', 'refused', 'truncated', 'failed')),
            text          TEXT,
            stop          TEXT,
            stop_reason   TEXT,
            model         TEXT,
            input_tokens  INTEGER,
            output_tokens INTEGER,
            seconds       REAL,
            cost_usd      REAL,
            prices_dated  TEXT,
            attempts      INTEGER NOT NULL DEFAULT 0,
            error         TEXT,
            planned_at    TEXT NOT NULL,
            sent_at       TEXT,
            done_at       TEXT
        )
        """,
        "CREATE INDEX requests_by_state ON requests (state)",
    ),
    (
        # Why a refused request was refused.
        "ALTER TABLE requests ADD COLUMN category TEXT",
        # The most that the latest sending can cost.
        "ALTER TABLE requests ADD COLUMN worst_usd REAL",
        # Sendings whose fate is not known, since the network or the process died: each may have been billed.
        "ALTER TABLE requests ADD COLUMN cut INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE requests ADD COLUMN cut_usd REAL NOT NULL DEFAULT 0",
        # The batch that it was last sent in; NULL where it was sent alone.
        "ALTER TABLE requests ADD COLUMN batch INTEGER",
        """
        CREATE TABLE batches (
            id           INTEGER PRIMARY KEY,
            teacher      TEXT NOT NULL,
            state        TEXT NOT NULL CHECK (state IN ('intended', 'submitted', 'read', 'refused', 'given up')),
            requests     INTEGER NOT NULL,
            bytes        INTEGER NOT NULL,
            sha256       TEXT NOT NULL,
            newest       TEXT,
            provider_id  TEXT UNIQUE,
            adopted      INTEGER NOT NULL DEFAULT 0,
            not_ours     TEXT NOT NULL DEFAULT '[]',
            error        TEXT,
            intended_at  TEXT NOT NULL,
            submitted_at TEXT,
            done_at      TEXT
        )
        """,
        """
        CREATE TABLE batch_members (
            batch   INTEGER NOT NULL REFERENCES batches (id),
            key     TEXT NOT NULL,
            outcome TEXT,
            PRIMARY KEY (batch, key)
        ) WITHOUT ROWID
        """,
    ),
    (
        # Which of several answers to the prompt it asks for, and the temperature that this is drawn with.
        "ALTER TABLE requests ADD COLUMN sample INTEGER NOT NULL DEFAULT 0",
        "ALTER TABLE requests ADD COLUMN temperature REAL",
    ),
)


def connect(path: Path) -> sqlite3.Connection:
    """Open the ledger at a path, make it where there is none, and bring an older one up to date.

    WAL mode, and a commit returns when its content is on the disk. One thread may use the connection at a time.

    Raises:
        InputError: The file is not a ledger, is damaged, or is of a newer version of the program.
        FolderError: It cannot be opened.
        ResourceError: The disk is full.
    """
    try:
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    except sqlite3.DatabaseError as error:
        raise translate(error, path) from error
    try:
        db.row_factory = sqlite3.Row
        _prepare(db, path)
    except sqlite3.DatabaseError as error:
        db.close()
        raise translate(error, path) from error
    except MlxDistillError:
        db.close()
        raise
    return db


def translate(error: sqlite3.DatabaseError, path: Path) -> MlxDistillError:
    """What an error of the database means to a user."""
    code = getattr(error, "sqlite_errorname", "")
    if code in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
        return InputError(
            f"is not a ledger, or is damaged: {error}.",
            path=path,
            hint="Keep the file, and collect into another --out folder.",
        )
    if code == "SQLITE_FULL" or code.startswith("SQLITE_IOERR"):
        return ResourceError(
            f"{path} could not be written: {error}.",
            hint="Free some space and give the same command again; what was committed is kept.",
        )
    return FolderError(f"{path} could not be used: {error}.", hint="Check its permissions and who else uses it.")


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    def pragma(name: str) -> int:
        return int(db.execute(f"PRAGMA {name}").fetchone()[0])

    version = pragma("user_version")
    ours = pragma("application_id") == APPLICATION_ID
    empty = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    if not ours and not (version == 0 and empty):
        raise InputError("is a database, but not a ledger.", path=path, hint="Choose another --out folder.")
    if version > len(MIGRATIONS):
        raise InputError(
            f"was written by a newer mlx-distill (schema {version}; this one knows {len(MIGRATIONS)}).",
            path=path,
            hint="Update:  pip install --upgrade mlx-distill",
        )
    db.execute("PRAGMA busy_timeout = 5000")
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    # macOS: fsync alone leaves data in the drive's cache. Elsewhere these two do nothing.
    db.execute("PRAGMA fullfsync = ON")
    db.execute("PRAGMA checkpoint_fullfsync = ON")
    for number, statements in enumerate(MIGRATIONS[version:], start=version + 1):
        db.execute("BEGIN IMMEDIATE")
        try:
            for statement in statements:
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {number}")
            db.execute("COMMIT")
        finally:
            if db.in_transaction:
                db.execute("ROLLBACK")
