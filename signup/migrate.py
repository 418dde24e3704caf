"""`python -m signup.migrate`: prepare an older table `users` as docs/production.md describes it."""

import sys
import time
from contextlib import closing, suppress
from typing import Any

from psycopg2 import Error, errors

from .config import Config
from .database import describe, prepare_table, statements
from .pool import connect
from .validation import fold_email

SQL = statements("migrate.sql")
BATCH, TRIES = 10_000, 60  # rows, and attempts to get a lock


def migrate(cursor: Any, finish: bool) -> None:
    """Prepare the table; `finish` also removes what older instances need. Raises SystemExit."""
    cursor.execute(SQL["start"])
    supported, complete, indexed = cursor.fetchone()
    if not supported:
        sys.exit("no table users of an older version: see An existing table in docs/production.md")
    if not complete:  # email_folded is missing, or may be NULL
        _refuse(cursor, SQL["twice"].format('lower(email COLLATE "C")'))
        _change(cursor, SQL["add column"])
    for missing in (False, True):  # first what an older rule folded: it may hold another's place
        _fold_rows(cursor, missing)
    if not indexed:
        _refuse(cursor, SQL["twice"].format("email_folded"))
        _change(cursor, SQL["drop incomplete index"])
        print("building the unique index", flush=True)
        cursor.execute("CREATE UNIQUE INDEX CONCURRENTLY ON users (email_folded)")
    if finish:
        for step in ("drop trigger", "validate", "set not null", "drop older indexes"):
            _change(cursor, SQL[step])


def _change(cursor: Any, statements: str) -> None:
    # While a change waits for its lock, signups wait behind it. So it gives up soon.
    cursor.execute("SET lock_timeout = '200ms'")
    for _ in range(TRIES):
        with suppress(errors.LockNotAvailable):
            cursor.execute(statements)
            return
        print("another transaction uses the table: waiting", flush=True)
        time.sleep(1)
    sys.exit("another transaction (a backup, autovacuum?) uses the table: run this again after it")


def _fold_rows(cursor: Any, missing: bool) -> None:
    last, read, folded = -(2**62), 0, 0
    while True:
        cursor.execute(SQL["rows"], (last, missing, BATCH))
        if not (rows := cursor.fetchall()):
            return
        wrong = {n: new for n, email, old in rows if (new := fold_email(email)) != old}
        changes = (list(wrong), list(wrong.values()))
        try:
            cursor.execute(SQL["fold"], changes)
        except errors.UniqueViolation:
            _refuse(cursor, SQL["collisions"], changes)
            continue
        last, read, folded = rows[-1][0], read + len(rows), folded + len(wrong)
        print(f"{read} rows read, {folded} folded, up to id {last}", flush=True)


def _refuse(cursor: Any, question: str, values: Any = None) -> None:
    cursor.execute(question, values)
    if groups := "; ".join(", ".join(map(str, numbers)) for (numbers,) in cursor):
        sys.exit(f"users who share an email in any letter case, by id: {groups}: keep one of each")


def main() -> None:
    if sys.argv[1:] not in ([], ["--finish"]):
        sys.exit("usage: python -m signup.migrate [--finish]")
    finish, config = "--finish" in sys.argv, Config.from_env(workers=1)
    try:
        with closing(connect(config, time.monotonic() + 10)) as connection:
            connection.deadline = time.monotonic() + 7 * 86400  # a week
            migrate(connection.cursor(), finish)
    except (Error, KeyboardInterrupt) as error:
        sys.exit(f"stopped by {describe(error)}: what is done is kept, so run this again")
    if cause := prepare_table(config):  # the check of the next start
        sys.exit(cause)
    print("done" if finish else "done: once no older instance runs, run this with --finish")


if __name__ == "__main__":
    main()
