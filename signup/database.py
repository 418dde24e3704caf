"""PostgreSQL: the schema, the insert, and the check whether it answers."""

import contextlib
import logging
import threading
import zlib
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

import psycopg2
from flask import Flask
from psycopg2 import errors

from . import slots
from .config import Config, ConfigError
from .metrics import Metrics
from .pool import Budget, Connection, Pool, connect
from .validation import Signup

SCHEMA = Path(__file__).with_name("schema.sql")
START_TIMEOUT = 15.0  # seconds that a start waits for the database
READY_TIMEOUT = 1.0  # seconds for each step of a readiness check; there are two
# The server ends a statement at DATABASE_STATEMENT_TIMEOUT and says so; the client gives up
# this many seconds later, which only a server that is paused or cut off makes it do.
GRACE = 1.0

COLUMNS = ("id", "email", "first_name", "last_name", "created_at", "updated_at")
RFC3339 = """to_char({} AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"Z"')"""
INSERT = f"""
INSERT INTO users (email, first_name, last_name) VALUES (%s, %s, %s)
ON CONFLICT (lower(email)) DO NOTHING
RETURNING id, email, first_name, last_name,
    {RFC3339.format("created_at")}, {RFC3339.format("updated_at")}
"""
# To plan the INSERT takes as long as to execute it, so a connection has it planned once. The name
# goes with the text: behind a pooler, another version of the service may have left its own.
PLANNED = INSERT % ("$1", "$2", "$3")
NAME = f"insert_user_{zlib.crc32(PLANNED.encode()):08x}"
PREPARE = f"PREPARE {NAME} (text, text, text) AS {PLANNED};"
EXECUTE = f"EXECUTE {NAME} (%s, %s, %s)"

log = logging.getLogger(__name__)


class DuplicateEmail(Exception):
    """The email is registered already, in this or another letter case."""


class Unavailable(Exception):
    """The service can't start, since the database can't be used; the message says why."""


class Database:
    """What the views need of PostgreSQL."""

    def __init__(self, config: Config, metrics: Metrics) -> None:
        if config.database_url is None:
            raise ConfigError(
                "DATABASE_URL is not set: start the service with gunicorn, which brings an "
                "embedded PostgreSQL, or set postgresql://user:password@host:port/database"
            )
        self._config = config
        self._metrics = metrics
        share, rest = divmod(config.database_max_connections, config.workers)
        budget = Budget(
            config.database_max_connections,
            config.metrics_dir and config.metrics_dir / "connections.lock",
        )
        self.pool = Pool(config, share + ((slots.current or 0) < rest), budget, metrics)
        threading.Thread(target=self._sample, name="pool-sampler", daemon=True).start()

    def insert_user(self, signup: Signup) -> dict[str, Any]:
        """Store `signup` durably; the row as JSON values, times in RFC 3339, UTC.

        Never repeated by itself: when the connection is lost after sending, nobody knows whether
        the row was committed. Raises DuplicateEmail, PoolTimeout or psycopg2.Error.
        """
        connection = self.pool.acquire(self._config.database_pool_timeout)
        try:
            connection.deadline = monotonic() + self._config.database_statement_timeout + GRACE
            started = perf_counter()
            try:
                row = _insert(connection, signup)
            finally:
                self._metrics.insert_duration.observe(perf_counter() - started)
        finally:
            self.pool.release(connection)
        if row is None:
            raise DuplicateEmail
        return dict(zip(COLUMNS, row, strict=True))

    def check(self) -> None:
        """Return if the database answers within 2 seconds; raise PoolTimeout or psycopg2.Error."""
        connection = self.pool.acquire(READY_TIMEOUT)
        try:
            connection.deadline = monotonic() + READY_TIMEOUT
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")
        finally:
            self.pool.release(connection)

    def _sample(self) -> None:
        pause = threading.Event()
        while not pause.wait(self._config.metrics_sample_interval):
            for state, count in self.pool.usage().items():
                self._metrics.connections[state].set(count)


def _insert(connection: Connection, signup: Signup) -> tuple[Any, ...] | None:
    with connection.cursor() as cursor:
        if connection.prepared is not False:
            # Whichever of these it is refused with, nothing has been stored.
            try:
                cursor.execute(EXECUTE if connection.prepared else PREPARE + EXECUTE, signup)
                connection.prepared = True
                return cursor.fetchone()
            except errors.DuplicatePreparedStatement:  # the first INSERT after PREPARE has failed
                connection.prepared = True
            except (
                errors.InvalidSqlStatementName,  # another connection of a pooler such as PgBouncer
                errors.FeatureNotSupported,  # the table's columns have changed since
            ):
                connection.prepared = False
        cursor.execute(INSERT, signup)
        return cursor.fetchone()


def init_app(app: Flask, config: Config) -> None:
    """Give `app` its database; raises ConfigError without a DATABASE_URL."""
    app.extensions["database"] = Database(config, app.extensions["metrics"])


def create_schema(config: Config) -> None:
    """Create the table where it is missing; wait START_TIMEOUT seconds for the database.

    Raises Unavailable with the last cause.
    """
    give_up = monotonic() + START_TIMEOUT
    while True:
        try:
            connection = connect(config, deadline=monotonic() + READY_TIMEOUT)
            with contextlib.closing(connection), connection.cursor() as cursor:
                connection.deadline = monotonic() + START_TIMEOUT
                cursor.execute(SCHEMA.read_text())
            return
        except psycopg2.Error as error:
            cause = describe(error)
            if not isinstance(error, psycopg2.OperationalError) or monotonic() > give_up:
                raise Unavailable(f"the database can't be used: {cause}") from error
            log.warning("waiting for the database: %s", cause)
            sleep(1)


def describe(error: Exception) -> str:
    """The cause in one line for the log, without the parts that quote a row or the statement."""
    text = isinstance(error, psycopg2.Error) and error.diag.message_primary
    text = text or (str(error).strip() or "gone").splitlines()[0]
    return f"{type(error).__name__}: {text}"
