"""A worker's connection pool: psycopg2's, with a queue for waiting requests and a liveness check.

Unmodified, that pool raises when exhausted (psycopg2 issue 1220), and connects under its lock.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import psycopg2
from psycopg2.errors import ReadOnlySqlTransaction
from psycopg2.pool import PoolError, ThreadedConnectionPool

from .config import Config
from .connection import Connection, connect
from .metrics import Metrics

PING_AFTER, PING_TIMEOUT = 5.0, 1.0  # seconds idle before a ping, and seconds to answer it


class Pool(ThreadedConnectionPool):
    """A pool of at most `size` connections, opened on demand and then kept."""

    _lock: threading.Lock  # these four are psycopg2's, and missing from its type stubs
    _pool: list[Connection]  # idle connections
    _used: dict[int, Connection]  # connections in use, by key
    _rused: dict[int, int]  # their keys, by id(connection)

    def __init__(self, config: Config, size: int, metrics: Metrics) -> None:
        super().__init__(0, size)
        self.minconn = size  # keep every returned connection open
        self._config, self._metrics = config, metrics
        self._free = size  # turns left; each is the right to an idle connection or a new one
        self._waiting: deque[threading.Event] = deque()  # requests, in order of arrival
        self._trusted = 0.0  # connections opened before this time are closed
        threading.Thread(target=self._sample, daemon=True).start()

    @contextmanager
    def connection(self, timeout: float) -> Iterator[Connection]:
        """Lend a live one within `timeout` seconds. Raises PoolError, or connect's errors."""
        deadline = monotonic() + timeout
        with self._metrics.pool_wait.time():
            self._wait_for_turn(deadline)
            connection = self._take(deadline)
        try:
            yield connection
        except psycopg2.Error as error:
            if connection.closed or isinstance(error, ReadOnlySqlTransaction):
                self._drop(connection.used)
            raise
        finally:
            self.putconn(connection, close=connection.opened < self._trusted)
            self._end_turn()

    def _wait_for_turn(self, deadline: float) -> None:
        with self._lock:
            if self._free:
                self._free -= 1
                return
            turn = threading.Event()
            self._waiting.append(turn)
        if not turn.wait(deadline - monotonic()):
            with self._lock:
                if not turn.is_set():  # not even since the timeout
                    self._waiting.remove(turn)
                    self._metrics.pool_timeouts.inc()
                    raise PoolError("no connection came free in time")

    def _end_turn(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1

    def _take(self, deadline: float) -> Connection:
        try:
            connection = self._idle(deadline) or connect(self._config, deadline)
        except BaseException:
            self._end_turn()
            raise
        connection.used = monotonic()
        with self._lock:
            key = self._rused[id(connection)] = id(connection)
            self._used[key] = connection
        return connection

    def _idle(self, deadline: float) -> Connection | None:
        while True:
            with self._lock:
                if not self._pool:
                    return None
                connection, now = self._pool.pop(), monotonic()
            try:
                connection.poll()  # reads the server's last message, if any
                connection.poll()  # detects that the server closed the connection
                if now > connection.used + PING_AFTER:
                    connection.deadline = min(now + PING_TIMEOUT, (now + deadline) / 2)
                    with connection.cursor() as cursor:
                        cursor.execute("SELECT 1")
                return connection
            except psycopg2.Error:
                self._drop(now)

    def _drop(self, moment: float) -> None:
        """Close connections opened before `moment`: idle ones now, the others when returned."""
        with self._lock:
            self._trusted = max(self._trusted, moment)
            for idle in [each for each in self._pool if each.opened < moment]:
                self._pool.remove(idle)
                idle.close()

    def _sample(self) -> None:
        pause = threading.Event()
        while not pause.wait(self._config.metrics_sample_interval):
            with self._lock:
                in_use, idle = len(self._used), len(self._pool)
            for state, count in (("in_use", in_use), ("idle", idle), ("open", in_use + idle)):
                self._metrics.connections[state].set(count)
