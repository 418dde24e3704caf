"""The connections of one worker: psycopg2's pool, with what it lacks.

`ThreadedConnectionPool` raises when it is exhausted (psycopg2 issue 1220), connects while it holds
its lock, closes what comes back beyond minconn, and hands out connections that the server has
closed. `Pool` waits, in turn, connects aside, keeps its connections, and looks before it lends one.
In a worker, `threading` is gevent's: its threads are greenlets.
"""

import fcntl
import functools
import select
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path
from time import monotonic, perf_counter

import psycopg2
from gevent import get_hub, getcurrent, monkey
from psycopg2 import extensions
from psycopg2.pool import ThreadedConnectionPool

from .config import Config
from .metrics import Metrics

TOKEN_POLL = 0.05  # seconds between two tries for what only another worker can give back
CONNECT_GRACE = 1.0  # seconds for a new connection after the request that asked for it has given up

READ, WRITE = 1, 2  # as gevent's event loop calls them

poll = monkey.get_original("select", "poll")  # the kernel's, see _poll


class PoolTimeout(Exception):
    """No connection came free in time."""


class Connection(extensions.connection):
    """A connection whose every wait ends at `deadline` (of time.monotonic)."""

    token = 0  # its part of the budget
    prepared: bool | None = None  # for signup.database: whether it has its statement, if known

    def __init__(self, dsn: str, *, deadline: float) -> None:
        self.deadline = deadline
        super().__init__(dsn)


def _wait(connection: Connection) -> None:
    # libpq has no time limit for a statement on the client's side: without this one a paused
    # server would hold a request forever. What is raised here closes the connection.
    while (state := connection.poll()) != extensions.POLL_OK:
        left = max(0.0, connection.deadline - monotonic())
        event = select.POLLIN if state == extensions.POLL_READ else select.POLLOUT
        # Beside a greenlet, others go on. One that finds its time up after its process was paused
        # may have its answer nevertheless.
        wait = _switch if getcurrent().parent else _poll
        if not wait(connection, event, left) and not _poll(connection, event):
            raise psycopg2.OperationalError("the database did not answer in time")


def _switch(connection: Connection, event: int, seconds: float) -> bool:
    # As gevent.socket.wait_read, without the layers of its Timeout, which an INSERT would feel.
    hub = get_hub()
    ready = hub.loop.io(connection.fileno(), READ if event == select.POLLIN else WRITE)
    timer = hub.loop.timer(seconds)
    timer.start(getcurrent().throw, TimeoutError, update=True)
    try:
        hub.wait(ready)
        return True
    except TimeoutError:
        return False
    finally:
        timer.close()
        ready.close()


def _poll(connection: Connection, event: int, seconds: float = 0) -> bool:
    # The kernel's own: gevent's takes twenty times as long to find that nothing is there.
    poller = poll()
    poller.register(connection.fileno(), event)
    return bool(poller.poll(seconds * 1000))


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
        # Without a space at its end, at which PgBouncer from 1.20 on would stumble.
        options=f"-c timezone=UTC -c statement_timeout={timeout} {own}".strip(),
    )
    connection.autocommit = True
    return connection


def _try(config: Config, deadline: float) -> Connection | Exception:
    # What a thread of gevent's pool raises is printed, whoever may catch it.
    try:
        return connect(config, deadline)
    except Exception as error:
        return error


class Budget:
    """The `size` connections that all workers of a master may have open, old and new ones too.

    A connection is a record lock on one byte of `file`: the kernel drops the locks of a process
    that ends, however it ends. Without a file, this process has the budget to itself.
    """

    def __init__(self, size: int, file: Path | None) -> None:
        self._free = set(range(size))
        self._file = file and file.open("w")  # never closed: that would drop all locks

    def take(self) -> int | None:
        """A token that no worker holds, or None."""
        for token in self._free:
            if self._file:
                try:
                    fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, token)
                except OSError:
                    continue
            self._free.remove(token)
            return token
        return None

    def give_back(self, token: int) -> None:
        """Return what `take` gave."""
        if self._file:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, token)
        self._free.add(token)


class Attempt:
    """An attempt to open a connection, and its error if it has failed."""

    error: Exception | None = None
    is_over = False


class Waiter(threading.Condition):
    """A request that waits for a connection, and the one that it was given."""

    connection: Connection | None = None


class Pool(ThreadedConnectionPool):
    """At most `size` connections within `budget`, opened when needed and then kept."""

    # psycopg2's own, which its type stubs leave out.
    _lock: threading.Lock
    _pool: list[Connection]  # the idle ones
    _used: dict[int, Connection]  # by a key,
    _rused: dict[int, int]  # and the key by the connection's id
    _putconn: Callable[..., None]

    def __init__(self, config: Config, size: int, budget: Budget, metrics: Metrics) -> None:
        super().__init__(0, size)
        self.minconn = size  # putconn closes what comes back beyond minconn
        self._config = config
        self._budget = budget
        self._metrics = metrics
        self._waiters: deque[Waiter] = deque()
        self._attempts = 0
        self._failing = False  # the last attempt has failed
        self._retired = False

    def acquire(self, timeout: float) -> Connection:
        """A live connection, which `release` takes back; waits `timeout` seconds at most.

        Raises PoolTimeout, or psycopg2.Error when a connection can't be opened.
        """
        started = perf_counter()
        try:
            return self._acquire(monotonic() + timeout)
        except PoolTimeout:
            self._metrics.pool_timeouts.inc()
            raise
        finally:
            self._metrics.pool_wait.observe(perf_counter() - started)

    def release(self, connection: Connection) -> None:
        """Take back what `acquire` gave, whatever has become of it."""
        with self._lock:
            self._putconn(connection, close=self._retired)  # discards one that is closed
            if connection.closed:
                self._budget.give_back(connection.token)
                if self._waiters:
                    self._waiters[0].notify()  # may open another one
            self._hand_over()

    def usage(self) -> dict[str, int]:
        """The number of connections in each state."""
        with self._lock:
            in_use, idle = len(self._used), len(self._pool)
        return {"in_use": in_use, "idle": idle, "open": in_use + idle}

    def retire(self) -> None:
        """Keep no idle connection any more: the worker ends, and its successor needs them."""
        with self._lock:
            self._retired = True
            while self._pool:
                self._discard(self._pool.pop())

    def _acquire(self, deadline: float) -> Connection:
        while True:
            connection = self._take(deadline)
            # Nothing is due from an idle server, so what there is to read is its farewell.
            if not _poll(connection, select.POLLIN):
                return connection
            connection.close()
            self.release(connection)

    def _take(self, deadline: float) -> Connection:
        """An idle connection, or the next one that is returned or new; first come, first served."""
        attempt: Attempt | None = None
        with self._lock:
            if self._pool and not self._waiters:
                return self._lend()
            waiter = Waiter(self._lock)
            self._waiters.append(waiter)
            try:
                while waiter.connection is None:
                    if attempt and attempt.error:
                        raise attempt.error
                    if attempt is None or attempt.is_over:
                        attempt = self._open(deadline)
                    patience = deadline - monotonic()
                    if patience <= 0:
                        raise PoolTimeout("no connection came free in time")
                    waiter.wait(patience if attempt else min(patience, TOKEN_POLL))
            finally:
                if waiter.connection is None:
                    self._waiters.remove(waiter)
            return waiter.connection

    def _lend(self) -> Connection:
        """An idle connection, which from now on is in use; call it with the lock held."""
        connection = self._pool.pop()
        key = self._rused[id(connection)] = id(connection)
        self._used[key] = connection
        return connection

    def _hand_over(self) -> None:
        """Give what is idle to who waits; call it with the lock held."""
        while self._pool and self._waiters:
            waiter = self._waiters.popleft()
            waiter.connection = self._lend()
            waiter.notify()

    def _open(self, deadline: float) -> Attempt | None:
        """Start to open a connection, if one more is allowed; call it with the lock held."""
        count = len(self._pool) + len(self._used) + self._attempts
        # While connecting fails, one attempt at a time: a server that hangs would have to work
        # off all of them once it is back.
        if count >= self.maxconn or (self._failing and self._attempts):
            return None
        token = self._budget.take()
        if token is None:
            return None
        attempt = Attempt()

        def run() -> None:
            # In a thread of the system, since libpq looks up names without asking `_wait`.
            opened = get_hub().threadpool.apply(_try, (self._config, deadline + CONNECT_GRACE))
            with self._lock:
                self._attempts -= 1
                attempt.is_over = True
                self._failing = isinstance(opened, Exception)
                if isinstance(opened, Exception):
                    attempt.error = opened
                    self._budget.give_back(token)
                else:
                    opened.token = token
                    self._pool.append(opened)
                    self._hand_over()
                for waiter in self._waiters:
                    waiter.notify()

        # Aside, so that a slow connect keeps nobody from a connection that comes free meanwhile.
        threading.Thread(target=run, name="pool-connect", daemon=True).start()
        self._attempts += 1
        return attempt

    def _discard(self, connection: Connection) -> None:
        connection.close()
        self._budget.give_back(connection.token)
