"""PostgreSQL: the table, the INSERT and the readiness check."""

import logging
from contextlib import closing, suppress
from datetime import UTC
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg2
from psycopg2 import errors
from psycopg2.pool import PoolError

from .config import Config, ConfigError
from .connection import connect
from .metrics import Metrics
from .pool import Pool
from .validation import Signup, fold_email

SCHEMA = Path(__file__).with_name("schema.sql")
READY_WAIT, READY_TIMEOUT = 1.0, 1.9  # seconds behind signups, and in all, of a readiness check
RACE_LOST = errors.DuplicateTable, errors.DuplicateObject, errors.UniqueViolation
GRACE = 1.0  # seconds for the server to report that DATABASE_STATEMENT_TIMEOUT has expired

INSERT = """
INSERT INTO users (email, email_folded, first_name, last_name, created_at, updated_at)
VALUES (%s, %s, %s, %s, now(), now())
ON CONFLICT (email_folded) DO NOTHING RETURNING CAST(id AS bigint), CAST(created_at AS timestamptz)
"""
# Once in a session. (If a role's own default is serializable, a duplicate is an error.)
SESSION = """
SELECT set_config('statement_timeout', %s, false),
    set_config('default_transaction_isolation', 'read committed', false)
WHERE pg_backend_pid() = %s
"""
# Through a pooler, which the process id reveals: in one message with each INSERT, for it alone.
TRANSACTION = "SET TRANSACTION ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = {};"


class Database:
    """The views' access to PostgreSQL, over at most `connections`."""

    def __init__(self, config: Config, connections: int, metrics: Metrics) -> None:
        self._config, self._metrics = config, metrics
        self._limit = str(round(config.database_statement_timeout * 1000))  # milliseconds
        self._answered = 0.0  # when the database last answered an INSERT
        self._reported: dict[str, float] = {}  # when each cause was last logged
        self._pool = Pool(config, connections, metrics)

    def insert_user(self, signup: Signup) -> dict[str, Any] | None:
        """Insert a user. Return its row (RFC 3339 times), None if known. Raises psycopg2.Error."""
        values = (signup.email, fold_email(signup.email), signup.first_name, signup.last_name)
        timeout = self._config.database_pool_timeout
        with self._pool.connection(timeout) as connection, connection.cursor() as cursor:
            connection.deadline = monotonic() + self._config.database_statement_timeout + GRACE
            if connection.settings is None:
                cursor.execute(SESSION, (self._limit, connection.info.backend_pid))
                connection.settings = "" if cursor.fetchone() else TRANSACTION.format(self._limit)
            # Never retry: an INSERT sent before the connection was lost may be committed.
            with self._metrics.insert_duration.time():
                cursor.execute(connection.settings + INSERT, values)
            row, self._answered = cursor.fetchone(), monotonic()
        if not row:
            return None
        created = f"{row[1].astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"  # roles may set a time zone
        return {"id": row[0], **signup._asdict(), "created_at": created, "updated_at": created}

    def check(self) -> None:
        """Raise psycopg2.Error unless a primary answers within 2 seconds."""
        started = monotonic()
        try:
            with self._pool.connection(READY_TIMEOUT - 0.2, READY_WAIT) as connection:
                connection.deadline = started + READY_TIMEOUT
                cursor = connection.cursor()
                cursor.execute("SHOW transaction_read_only")
                if cursor.fetchone() != ("off",):  # a standby returns "on" as well
                    raise errors.ReadOnlySqlTransaction("the database is read-only")
        except PoolError:  # signups use all connections
            if self._answered < started:
                raise

    def report(self, error: Exception) -> None:
        """Log the cause of a database error, each cause at most once a second."""
        cause, now = describe(error), monotonic()
        if now >= self._reported.get(cause, 0) + 1:
            self._reported[cause] = now
            logging.error("database: %s", cause)


def prepare_table(config: Config) -> None:
    """Create the table if there is none; never change one, but check it. Raises ConfigError."""
    try:
        with closing(connect(config, monotonic() + 10)) as connection:
            cursor = connection.cursor()
            cursor.execute("SHOW server_encoding")
            if cursor.fetchone() != ("UTF8",):
                raise ConfigError("the database can't be used: its encoding is not UTF8")
            cursor.execute("SELECT to_regclass('users')")
            if cursor.fetchone() == (None,):
                with suppress(*RACE_LOST):  # to another instance that starts at the same moment
                    cursor.execute(SCHEMA.read_text())
            # Checks columns, index and the table's privileges, and executes nothing.
            cursor.execute(f"EXPLAIN {INSERT}", [""] * 4)
    except psycopg2.Error as error:
        what = describe(error)
        if isinstance(error, errors.InvalidColumnReference):
            what = "the table users has no unique index on email_folded alone"
        if isinstance(error, psycopg2.ProgrammingError | psycopg2.DataError):
            what += ": see An existing table in docs/production.md"
        raise ConfigError(f"the database can't be used: {what}") from error


def describe(error: BaseException) -> str:
    """Return the cause for the log: the first line only, as later ones quote rows and SQL."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
