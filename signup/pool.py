"""The connections of one worker: psycopg2's pool, with what it lacks.

`ThreadedConnectionPool` raises when it is exhausted (psycopg2 issue 1220), connects while it holds
its lock, closes what comes back beyond minconn, and lends connections that the server has closed.
"""

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, perf_counter

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
        started = perf_counter()
        try:
            connection = self._acquire(monotonic() + timeout)
        except PoolTimeout:
            self._metrics.pool_timeouts.inc()
            raise
        finally:
            self._metrics.pool_wait.observe(perf_counter() - started)
        try:
            yield connection
        finally:
            self.putconn(connection)  # drops one that is closed
            self._end_turn()

    def _sample(self) -> None:
        pause = threading.Event()
        while not pause.wait(self._config.metrics_sample_interval):
            with self._lock:
                in_use, idle = len(self._used), len(self._pool)
            for state, count in (("in_use", in_use), ("idle", idle), ("open", in_use + idle)):
                self._metrics.connections[state].set(count)

    def _acquire(self, deadline: float) -> Connection:
        self._wait_for_turn(deadline)
        try:
            with self._lock:
                while self._pool:
                    connection = self._pool.pop()
                    if not connection.has_input():
                        return self._use(connection)
                    connection.close()  # as the server did
            connection = connect(self._config, deadline)
            with self._lock:
                return self._use(connection)
        except BaseException:
            self._end_turn()
            raise

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
                    raise PoolTimeout("no connection came free in time")

    def _end_turn(self) -> None:
        with self._lock:
            if self._waiting:
                self._waiting.popleft().set()
            else:
                self._free += 1

    def _use(self, connection: Connection) -> Connection:
        key = self._rused[id(connection)] = id(connection)
        self._used[key] = connection
        return connection
