"""The connections of one worker: psycopg2's pool, with what it lacks.

`ThreadedConnectionPool` raises when it is exhausted (psycopg2 issue 1220), connects while it holds
its lock, closes what comes back beyond minconn, and lends connections that the server has closed.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic, perf_counter

import psycopg2
from psycopg2.pool import ThreadedConnectionPool

from .config import Config
from .connection import Connection, connect
from .metrics import Metrics


class PoolTimeout(Exception):
    """No connection came free in time."""


class Pool(ThreadedConnectionPool):
    """At most `size` connections, opened when they are needed and then kept."""

    # psycopg2's own, which its type stubs leave out.
    _lock: threading.Lock
    _pool: list[Connection]  # the idle ones
    _used: dict[int, Connection]  # by a key,
    _rused: dict[int, int]  # and the key by the connection's id

    def __init__(self, config: Config, size: int, metrics: Metrics) -> None:
        super().__init__(0, size)
        self.minconn = size  # what comes back beyond minconn is closed
        self._config, self._metrics = config, metrics
        # A request that has its turn finds an idle connection, or may open one.
        self._free = size  # turns
        self._waiting: deque[threading.Event] = deque()  # in order of arrival
        threading.Thread(target=self._sample, daemon=True).start()

    @contextmanager
    def connection(self, timeout: float) -> Iterator[Connection]:
        """Lend a live connection for a `with` block; wait at most `timeout` seconds for it.

        Raises PoolTimeout, or psycopg2.Error when a connection can't be opened.
        """
        started, deadline = perf_counter(), monotonic() + timeout
        try:
            self._wait_for_turn(deadline)
            connection = self._take(deadline)
        finally:
            self._metrics.pool_wait.observe(perf_counter() - started)
        try:
            yield connection
        finally:
            self.putconn(connection)  # drops one that is closed
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
                if not turn.is_set():  # nor since
                    self._waiting.remove(turn)
                    self._metrics.pool_timeouts.inc()
                    raise PoolTimeout("no connection came free in time")

    def _end_turn(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1

    def _take(self, deadline: float) -> Connection:
        try:
            connection = self._idle() or connect(self._config, deadline)
        except BaseException:
            self._end_turn()
            raise
        with self._lock:
            key = self._rused[id(connection)] = id(connection)
            self._used[key] = connection
        return connection

    def _idle(self) -> Connection | None:
        while self._pool:
            with suppress(IndexError, psycopg2.Error):  # somebody took it, or the server ended it
                connection = self._pool.pop()
                connection.poll()  # finds the server's last words,
                connection.poll()  # and this one the end
                return connection
        return None

    def _sample(self) -> None:
        pause = threading.Event()
        while not pause.wait(self._config.metrics_sample_interval):
            with self._lock:
                in_use, idle = len(self._used), len(self._pool)
            for state, count in (("in_use", in_use), ("idle", idle), ("open", in_use + idle)):
                self._metrics.connections[state].set(count)
