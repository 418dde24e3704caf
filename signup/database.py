"""PostgreSQL: the pool of one worker, the insert, and the schema.

psycopg2's pool raises when it is exhausted, connects while it holds its lock, closes what comes
back beyond minconn, and hands out connections that the server has closed. `Pool` answers all four.
"""

import contextlib
import functools
import logging
import select
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, perf_counter, sleep
from typing import Any

import psycopg2
from flask import Flask
from psycopg2 import extensions
from psycopg2.pool import ThreadedConnectionPool

from . import slots
from .config import Config, ConfigError
from .metrics import Metrics
from .validation import Signup

SCHEMA = Path(__file__).with_name("schema.sql")
START_TIMEOUT = 30.0  # seconds that a start waits for the database
READY_TIMEOUT = 1.0  # seconds for each step of a readiness check; there are two
# The server ends a statement at DATABASE_STATEMENT_TIMEOUT and says so; the client gives up
# this many seconds later, which only a server that is paused or cut off makes it do.
GRACE = 1.0

COLUMNS = ("id", "email", "first_name", "last_name", "created_at", "updated_at")
INSERT = f"""
INSERT INTO users (email, first_name, last_name) VALUES (%s, %s, %s)
ON CONFLICT (lower(email)) DO NOTHING
RETURNING {", ".join(COLUMNS)}
"""

log = logging.getLogger(__name__)


class DuplicateEmail(Exception):
    """The email is registered already, in this or another letter case."""


class PoolTimeout(Exception):
    """No connection came free in time."""


class Unavailable(Exception):
    """The service can't start, since the database can't be used; the message says why."""


class Connection(extensions.connection):
    """A connection whose every wait ends at `deadline` (of time.monotonic)."""

    def __init__(self, dsn: str, *, deadline: float) -> None:
        self.deadline = deadline
        super().__init__(dsn)


def _wait(connection: Connection) -> None:
    # libpq has no time limit for a statement on the client's side: without this one a paused
    # server would hold a thread forever. What is raised here closes the connection.
    while (state := connection.poll()) != extensions.POLL_OK:
        poller = select.poll()
        poller.register(
            connection.fileno(),
            select.POLLIN if state == extensions.POLL_READ else select.POLLOUT,
        )
        if not poller.poll(max(0.0, connection.deadline - monotonic()) * 1000):
            raise psycopg2.OperationalError("the database did not answer in time")


extensions.set_wait_callback(_wait)


def connect(config: Config, deadline: float) -> Connection:
    """A new connection in autocommit mode: one statement is one transaction, one round trip.

    Raises psycopg2.Error when the database refuses, or does not answer before `deadline`.
    """
    assert config.database_url is not None
    own = extensions.parse_dsn(config.database_url).get("options", "")
    timeout = round(config.database_statement_timeout * 1000)
    connection: Connection = psycopg2.connect(
        config.database_url,
        connection_factory=functools.partial(Connection, deadline=deadline),
        application_name="signup",
        client_encoding="UTF8",
        options=f"-c timezone=UTC -c statement_timeout={timeout} {own}",
    )
    connection.autocommit = True
    return connection


class Pool(ThreadedConnectionPool):
    """At most `size` connections, opened when needed and then kept."""

    # psycopg2's own, which its type stubs leave out.
    _lock: threading.Lock
    _pool: list[Connection]  # the idle ones
    _used: dict[int, Connection]  # by a key,
    _rused: dict[int, int]  # and the key by the connection's id

    def __init__(self, config: Config, size: int, metrics: Metrics) -> None:
        super().__init__(0, size)
        self.minconn = size  # putconn closes what comes back beyond minconn
        self._config = config
        self._metrics = metrics
        self._permits = threading.BoundedSemaphore(size)

    @contextlib.contextmanager
    def connection(self, timeout: float) -> Iterator[Connection]:
        """A live connection, for as long as the block runs; waits `timeout` seconds at most.

        Raises PoolTimeout, or psycopg2.Error when a connection can't be opened.
        """
        started = perf_counter()
        deadline = monotonic() + timeout
        acquired = self._permits.acquire(timeout=timeout)
        self._metrics.pool_wait.observe(perf_counter() - started)
        if not acquired:
            self._metrics.pool_timeouts.inc()
            raise PoolTimeout
        try:
            connection = self._idle() or self._open(deadline)
            try:
                yield connection
            finally:
                self.putconn(connection)  # discards one that is closed
        finally:
            self._permits.release()

    def usage(self) -> dict[str, int]:
        """The number of connections in each state."""
        with self._lock:
            in_use, idle = len(self._used), len(self._pool)
        return {"in_use": in_use, "idle": idle, "open": in_use + idle}

    def _idle(self) -> Connection | None:
        while True:
            with self._lock:
                if not self._pool:
                    return None
                connection = self._pool.pop()
                self._lend(connection)
            # Nothing is due from an idle server, so what there is to read is its farewell.
            poller = select.poll()
            poller.register(connection.fileno(), select.POLLIN)
            if not poller.poll(0):
                return connection
            self.putconn(connection, close=True)

    def _open(self, deadline: float) -> Connection:
        connection = connect(self._config, deadline)  # without the lock: it may take long
        with self._lock:
            self._lend(connection)
        return connection

    def _lend(self, connection: Connection) -> None:
        key = id(connection)
        self._used[key] = connection
        self._rused[key] = key


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
        self.pool = Pool(config, share + ((slots.current or 0) < rest), metrics)
        threading.Thread(target=self._sample, name="pool-sampler", daemon=True).start()

    def insert_user(self, signup: Signup) -> dict[str, Any]:
        """Store `signup` durably; the row as JSON values, times in RFC 3339, UTC.

        Never repeated by itself: when the connection is lost after sending, nobody knows whether
        the row was committed. Raises DuplicateEmail, PoolTimeout or psycopg2.Error.
        """
        with self.pool.connection(self._config.database_pool_timeout) as connection:
            connection.deadline = monotonic() + self._config.database_statement_timeout + GRACE
            with self._metrics.insert_duration.time(), connection.cursor() as cursor:
                cursor.execute(INSERT, signup)
                row = cursor.fetchone()
        if row is None:
            raise DuplicateEmail
        return {
            name: _rfc3339(value) if isinstance(value, datetime) else value
            for name, value in zip(COLUMNS, row, strict=True)
        }

    def check(self) -> None:
        """Return if the database answers within 2 seconds; raise PoolTimeout or psycopg2.Error."""
        with self.pool.connection(READY_TIMEOUT) as connection:
            connection.deadline = monotonic() + READY_TIMEOUT
            with connection.cursor() as cursor:
                cursor.execute("SELECT 1")

    def _sample(self) -> None:
        pause = threading.Event()
        while not pause.wait(self._config.metrics_sample_interval):
            for state, count in self.pool.usage().items():
                self._metrics.connections[state].set(count)


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


def describe(error: psycopg2.Error) -> str:
    """The cause in one line, for the log; it has no password, and no value of a row."""
    return f"{type(error).__name__}: {' '.join(str(error).split('DETAIL:')[0].split())}"


def _rfc3339(time: datetime) -> str:
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")
