"""PostgreSQL: the table, the INSERT and the readiness check."""

import re
from contextlib import closing, suppress
from datetime import UTC
from pathlib import Path
from time import monotonic
from typing import Any

from psycopg2 import DataError, Error, ProgrammingError, errors
from psycopg2.pool import PoolError

from .config import Config, ConfigError
from .pool import Pool, connect
from .validation import Signup, fold_email


def statements(file: str) -> dict[str, str]:
    """Read the statements of a file in this folder, by name."""
    _, *parts = Path(__file__).with_name(file).read_text().split("-- name: ")
    return dict(part.split("\n", 1) for part in parts)


SQL = statements("database.sql")
TABLES = {"users": (Path(__file__).with_name("schema.sql"), SQL["insert_user"])}
READY_WAIT, READY_TIMEOUT = 1.0, 1.9  # seconds behind signups, and in all, of a readiness check
RACE_LOST = errors.DuplicateTable, errors.DuplicateObject, errors.UniqueViolation
PASSING = re.compile(  # causes that may pass; libpq tells only a text (English), no SQLSTATE
    r"^(?!.*authentication failed).*(\[Errno -|in time$|timed out|unreachable|unavailable|No route"
    "|Cannot assign|Connection re(fused|set)|failed: No such file|closed the connection|EOF det"
    "| read-only|hot standby|database system is|shutting down|too many |slots are|more connections"
    "|[Mm]ax client|conn crashed|terminating connection|_wait_timeout|login_retry)"
)
GRACE = 1.0  # seconds for the server to report that DATABASE_STATEMENT_TIMEOUT has expired


class Database(Pool):
    """A worker's connections, with the statements that the views need."""

    _answered = 0.0  # when the database last answered an INSERT

    def insert_user(self, signup: Signup) -> dict[str, Any] | None:
        """Insert a user. Return its row (RFC 3339 times), None if known. Raises psycopg2.Error."""
        values = [signup.email, fold_email(signup.email), signup.first_name, signup.last_name]
        if not (row := self._insert("insert_user", values)):
            return None
        created = f"{row[1].astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"  # roles may set a time zone
        return {"id": row[0], **signup._asdict(), "created_at": created, "updated_at": created}

    def _insert(self, name: str, values: list[str]) -> tuple[Any, ...] | None:
        timeout = self._config.database_pool_timeout
        limit = str(round(self._config.database_statement_timeout * 1000))  # milliseconds
        with self.connection(timeout) as connection, connection.cursor() as cursor:
            connection.deadline = monotonic() + self._config.database_statement_timeout + GRACE
            if connection.settings is None:
                # Once a session. Through a pooler, whose server has another process id, with each
                # INSERT, in one message. (Where serializable is the default, a duplicate fails.)
                cursor.execute(SQL["session"], (limit, connection.info.backend_pid))
                connection.settings = "" if cursor.fetchone() else SQL["transaction"].format(limit)
            # Never retry: an INSERT sent before the connection was lost may be committed.
            with self._metrics.queries[name].time():
                cursor.execute(connection.settings + SQL[name], values)
            row, self._answered = cursor.fetchone(), monotonic()
            return row

    def check(self) -> None:
        """Raise psycopg2.Error unless a primary answers within 2 seconds."""
        started = monotonic()
        try:
            with self.connection(READY_TIMEOUT - 0.2, READY_WAIT) as connection:
                connection.deadline = started + READY_TIMEOUT
                cursor = connection.cursor()
                cursor.execute("SHOW transaction_read_only")
                if cursor.fetchone() != ("off",):  # a standby returns "on" as well
                    raise errors.ReadOnlySqlTransaction("the database is read-only")
        except PoolError:  # signups use all connections
            if self._answered < started:
                raise


def prepare_table(config: Config) -> str:
    """Create or check the table; return why that has to wait, if it has. Raises ConfigError."""
    try:
        with closing(connect(config, monotonic() + 10)) as connection:
            cursor: Any = connection.cursor()
            for table, (schema, insert) in TABLES.items():
                cursor.execute(SQL["encoding and table"], [table])
                encoding, found = cursor.fetchone()
                if encoding != "UTF8":
                    raise ConfigError("the database can't be used: its encoding is not UTF8")
                if not found:
                    with suppress(*RACE_LOST):  # to another instance that starts just now
                        cursor.execute(schema.read_text())
                # Checks columns, index and the table's privileges, and executes nothing.
                cursor.execute(f"EXPLAIN {insert}", [""] * insert.count("%s"))
    except Error as error:
        what = describe(error)
        if all(map(PASSING.search, what.split("; "))):  # each of several hosts
            return what
        if isinstance(error, errors.InvalidColumnReference):
            what = f"the table {table} has no unique index on email_folded alone"
        if isinstance(error, ProgrammingError | DataError):
            what += ": see An existing table in docs/production.md"
        raise ConfigError(f"the database can't be used: {what}") from error
    return ""


def describe(error: BaseException) -> str:
    """Return the cause for the log: the first line only, as later ones quote rows and SQL."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
