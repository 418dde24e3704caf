"""PostgreSQL: the schema, the INSERT and the readiness check."""

import logging
from contextlib import closing
from datetime import UTC
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg2
from psycopg2.errors import ReadOnlySqlTransaction
from psycopg2.extras import execute_values

from .config import Config, ConfigError
from .connection import connect
from .metrics import Metrics
from .pool import Pool
from .validation import Signup, fold_email

SCHEMA = Path(__file__).with_name("schema.sql")
READY_TIMEOUT = 1.0  # seconds for each of the two steps of a readiness check
GRACE = 1.0  # seconds for the server to report that DATABASE_STATEMENT_TIMEOUT has expired

INSERT = """
INSERT INTO users (email, email_folded, first_name, last_name) VALUES (%s, %s, %s, %s)
ON CONFLICT DO NOTHING RETURNING id, created_at
"""
FOLD = """
UPDATE users SET email_folded = folded.email FROM (VALUES %s) AS folded (email, id)
WHERE users.id = folded.id
    AND NOT EXISTS (SELECT FROM users AS other WHERE other.email_folded = folded.email)
"""

log = logging.getLogger(__name__)


class Database:
    """The views' access to PostgreSQL, over at most `connections`."""

    def __init__(self, config: Config, connections: int, metrics: Metrics) -> None:
        self._config, self._metrics = config, metrics
        self._reported: dict[str, float] = {}  # when each cause was last logged
        self._pool = Pool(config, connections, metrics)

    def insert_user(self, signup: Signup) -> dict[str, Any] | None:
        """Insert a user. Return its row (RFC 3339 times), None if known. Raises psycopg2.Error."""
        values = (signup.email, fold_email(signup.email), signup.first_name, signup.last_name)
        timeout = self._config.database_pool_timeout
        with self._pool.connection(timeout) as connection, connection.cursor() as cursor:
            connection.deadline = monotonic() + self._config.database_statement_timeout + GRACE
            # Never retry: an INSERT sent before the connection was lost may be committed.
            with self._metrics.insert_duration.time():
                cursor.execute(INSERT, values)
            if not (row := cursor.fetchone()):
                return None
        created = f"{row[1].astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"  # roles may set a time zone
        return {"id": row[0], **signup._asdict(), "created_at": created, "updated_at": created}

    def check(self) -> None:
        """Raise psycopg2.Error unless a primary answers within 2 seconds."""
        with self._pool.connection(READY_TIMEOUT) as connection, connection.cursor() as cursor:
            connection.deadline = monotonic() + READY_TIMEOUT
            cursor.execute("SHOW transaction_read_only")
            if cursor.fetchone() != ("off",):  # a standby returns "on" as well
                raise ReadOnlySqlTransaction("the database is read-only")

    def report(self, error: Exception) -> None:
        """Log the cause of a database error, each cause at most once a second."""
        cause, now = describe(error), monotonic()
        if now >= self._reported.get(cause, 0) + 1:
            self._reported[cause] = now
            log.error("database: %s", cause)


def create_schema(config: Config) -> None:
    """Create or migrate the table. Raises ConfigError."""
    deadline = monotonic() + 10  # seconds
    try:
        with closing(connect(config, deadline)) as connection, connection.cursor() as cursor:
            cursor.execute("SHOW server_encoding")
            if cursor.fetchone() != ("UTF8",):
                raise ConfigError("the database can't be used: its encoding is not UTF8")
            connection.deadline = monotonic() + 600  # seconds, to migrate a large table
            cursor.execute(SCHEMA.read_text())
            cursor.execute("SELECT email, id FROM users WHERE email_folded IS NULL ORDER BY 2 DESC")
            folded = {fold_email(email): number for email, number in cursor}
            execute_values(cursor, FOLD, list(folded.items()), page_size=1000)
    except psycopg2.Error as error:
        raise ConfigError(f"the database can't be used: {describe(error)}") from error


def describe(error: Exception) -> str:
    """Return the cause for the log: the first line only, as later ones quote rows and SQL."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
