"""A worker's connection pool: psycopg2's, with a queue for waiting requests and a liveness check.

Unmodified, that pool raises when exhausted (psycopg2 issue 1220), and connects under its lock.
"""

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from time import monotonic

import psycopg2
from psycopg2 import errors
from psycopg2.extensions import TRANSACTION_STATUS_IDLE as IDLE
from psycopg2.pool import PoolError, ThreadedConnectionPool

from .config import Config
from .connection import Connection, connect
from .metrics import Metrics

PING_AFTER, PING_TIMEOUT = 5.0, 1.0  # seconds idle before a ping, and seconds to answer it


class Pool(ThreadedConnectionPool):
    """At most `size` turns: each is an idle connection, or None or a closed one to replace."""

    def __init__(self, config: Config, size: int, metrics: Metrics) -> None:
        # psycopg2 calls the factory under its lock: it only hands over what connect() has opened.
        self._opened: list[Connection] = []
        super().__init__(0, size, "", connection_factory=lambda _: self._opened.pop())
        self._config, self._metrics = config, metrics
        self._guard = threading.Lock()  # of the pool, and of all below
        self._turns: list[Connection | None] = [None] * size  # free ones, taken from the end
        self._waiting: deque[Future[Connection | None]] = deque()  # requests for a turn
        self._valid_from = 0.0  # connections opened before this time are closed
        threading.Thread(target=self._sample, daemon=True).start()

    @contextmanager
    def connection(self, timeout: float, probe_wait: float = 0) -> Iterator[Connection]:
        """Lend a live one within `timeout` seconds. Raises PoolError, or connect's errors."""
        # A readiness probe waits at most `probe_wait` seconds behind signups, and isn't counted.
        deadline = monotonic() + timeout
        with nullcontext() if probe_wait else self._metrics.pool_wait.time():
            turn = self._wait_for_turn(probe_wait or timeout, signup=not probe_wait)
            try:
                connection = self._live_connection(turn, deadline)
            except BaseException:
                self._end_turn(turn)
                raise
        connection.used = monotonic()
        try:
            yield connection
        except psycopg2.Error as error:
            if connection.closed or isinstance(error, errors.ReadOnlySqlTransaction):
                self._drop(connection.used)
            raise
        finally:
            self._end_turn(connection)

    def _wait_for_turn(self, seconds: float, signup: bool) -> Connection | None:
        with self._guard:
            if self._turns:
                return self._turns.pop()
            waiter: Future[Connection | None] = Future()
            self._waiting.append(waiter)
        try:
            with self._metrics.pool_waiting.track_inprogress() if signup else nullcontext():
                return waiter.result(seconds)
        except BaseException as error:
            if not waiter.cancel():  # its turn came just now
                self._end_turn(waiter.result())
            if not isinstance(error, TimeoutError):
                raise
            if signup:
                self._metrics.pool_timeouts.inc()
            raise PoolError("no connection came free in time") from None

    def _end_turn(self, turn: Connection | None) -> None:
        with self._guard:
            if turn:
                turn.used = monotonic()
                if turn.opened < self._valid_from or turn.get_transaction_status() != IDLE:
                    turn.close()
            while self._waiting:
                waiter = self._waiting.popleft()
                if waiter.set_running_or_notify_cancel():
                    waiter.set_result(turn)
                    return
            self._turns.insert(len(self._turns) if turn and not turn.closed else 0, turn)

    def _live_connection(self, turn: Connection | None, deadline: float) -> Connection:
        if turn and not turn.closed:
            now = monotonic()
            try:
                turn.poll()  # reads the server's last message, if any
                turn.poll()  # detects that the server closed the connection
                if now > turn.used + PING_AFTER:
                    turn.deadline = min(now + PING_TIMEOUT, (now + deadline) / 2)
                    with turn.cursor() as cursor:
                        cursor.execute("SELECT 1")
                return turn
            except psycopg2.Error:
                turn.close()
                self._drop(now)
        new = connect(self._config, deadline)
        with self._guard:
            if turn:
                self.putconn(turn, close=True)
            self._opened.append(new)
            self.getconn()  # counts it, and closeall() will close it
        return new

    def _drop(self, moment: float) -> None:
        """Close connections opened before `moment`: idle ones now, others when they come back."""
        with self._guard:
            self._valid_from = max(self._valid_from, moment)
            for turn in self._turns:
                if turn and turn.opened < self._valid_from:
                    turn.close()

    def _sample(self) -> None:
        pause = threading.Event()
        while not pause.wait(self._config.metrics_sample_interval):
            with self._guard:
                in_use = self.maxconn - len(self._turns)
                idle = sum(bool(turn and not turn.closed) for turn in self._turns)
            for state, count in (("in_use", in_use), ("idle", idle), ("open", in_use + idle)):
                self._metrics.connections[state].set(count)
