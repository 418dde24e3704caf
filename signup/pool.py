"""psycopg2's pool, with a queue (psycopg2 issue 1220), and a deadline on every wait of libpq's."""

import os
import select
import socket
import ssl
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from math import inf
from threading import Event, Lock, Thread
from time import monotonic
from typing import Any

from psycopg2 import Error, OperationalError, errors, extensions
from psycopg2.pool import PoolError, ThreadedConnectionPool

from .config import Config
from .metrics import Metrics

DEFAULTS = {  # unless the URL sets them
    "application_name": "signup",
    "target_session_attrs": "read-write",  # connect to the primary only
    "keepalives_idle": "30",  # seconds; detects connections that a NAT or load balancer dropped
    "keepalives_interval": "5",
    "tcp_user_timeout": "15000",  # milliseconds
}
PARTS = ("host", "hostaddr", "port")  # of an address
PING_AFTER, PING_TIMEOUT = 5.0, 1.0  # seconds idle before a ping, and seconds to answer it
SILENCE = 1.0  # seconds without progress, after which the next address is tried
_failed: dict[str, float] = {}  # the time of each address's last failure
_lookups: dict[str, Future[list[str]]] = {}  # the latest lookup of each name

# sslrootcert=system: else the OpenSSL of psycopg2's wheel searches a folder of its build machine.
os.environ.setdefault("SSL_CERT_FILE", ssl.get_default_verify_paths().openssl_cafile)
os.environ.setdefault("SSL_CERT_DIR", ssl.get_default_verify_paths().openssl_capath)


class Connection(extensions.connection):
    """A connection whose waits fail at `deadline` (time.monotonic), or after `silence` seconds."""

    def __init__(self, dsn: str, deadline: float, silence: float) -> None:
        self.opened = self.used = monotonic()
        self.deadline, self.silence = deadline, silence
        self.settings: str | None = None  # to send with each statement, see database.py
        super().__init__(dsn)


def connect(config: Config, deadline: float) -> Connection:
    """Connect in autocommit mode. Raises psycopg2.Error if no address accepts by `deadline`."""
    dsn = DEFAULTS | extensions.parse_dsn(config.database_url) | {"client_encoding": "UTF8"}
    limit = float(dsn.get("connect_timeout", 0)) or inf  # seconds for each address
    parts = {n: (dsn.get(n) or os.environ.get(f"PG{n.upper()}", "")).split(",") for n in PARTS}
    count, causes = max(map(len, parts.values())), []
    targets: list[dict[str, str]] = [{}]  # if their numbers differ, which libpq reports
    if all(len(each) in (1, count) for each in parts.values()):
        targets = [{name: (x * count)[n] for name, x in parts.items()} for n in range(count)]
    names = [each["host"] for each in targets if each and not each["hostaddr"]]
    lookups = {name: _look_up(name) for name in names if name[:1] not in "/@"}  # all at once
    while targets:
        targets.sort(key=lambda each: _failed.get(str(each), 0))  # what failed last is last
        target, now = targets.pop(0), monotonic()
        silence = min(SILENCE, (deadline - now) / (len(targets) + 1)) if targets else inf
        until = min(deadline, now + limit)
        try:
            if not target.get("hostaddr") and target.get("host") in lookups:
                found = lookups[target["host"]].result(min(until - now, silence))
                targets = [target | {"hostaddr": address} for address in found] + targets
                continue
            connection = Connection(extensions.make_dsn(**dsn | target), until, silence)
            connection.deadline, connection.silence, connection.autocommit = deadline, inf, True
            return connection
        except Exception as error:
            _failed[str(target)] = monotonic() if now < deadline else 0
            place = " ".join(dict.fromkeys(filter(None, target.values()))) or "the default server"
            causes.append(f"{place}: {(str(error).strip() or 'no answer in time').splitlines()[0]}")
    raise OperationalError("; ".join(causes))


def _look_up(name: str) -> Future[list[str]]:
    """Start a lookup, or join the one under way: silent name servers hold one thread per name."""

    def resolve() -> None:
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            _lookups[name].set_result([str(address[0]) for *_, address in found])
        except Exception as error:
            _lookups[name].set_exception(error)

    if name not in _lookups or _lookups[name].done():
        _lookups[name] = Future()
        Thread(target=resolve, daemon=True).start()
    return _lookups[name]


def _wait(connection: Any) -> None:
    # psycopg2 closes the connection if this raises.
    while (state := connection.poll()) != extensions.POLL_OK:
        event = select.POLLIN if state == extensions.POLL_READ else select.POLLOUT
        poller = select.poll()
        poller.register(connection.fileno(), event)
        left = max(min(connection.deadline - monotonic(), connection.silence), 0)
        # Poll twice: after a pause of this process, data may be waiting after the deadline.
        if not (poller.poll(left * 1000) or poller.poll(10)):
            raise OperationalError("the database did not answer in time")


extensions.set_wait_callback(_wait)


class Pool(ThreadedConnectionPool):
    """At most `size` turns: each is an idle connection, or None, or one to replace."""

    def __init__(self, config: Config, size: int, metrics: Metrics) -> None:
        # psycopg2 calls the factory under its lock: it only hands over what connect() has opened.
        self._opened: list[Connection] = []
        super().__init__(0, size, "", connection_factory=lambda _: self._opened.pop())
        self._config, self._metrics = config, metrics
        self._guard = Lock()  # of the pool, and of all below
        self._turns: list[Connection | None] = [None] * size  # free ones, taken from the end
        self._waiting: deque[Future[Connection | None]] = deque()  # requests for a turn
        self._valid_from = 0.0  # connections opened before this time are stale
        Thread(target=self._sample, daemon=True).start()

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
        except Error as error:
            if connection.closed or isinstance(error, errors.ReadOnlySqlTransaction):
                self._valid_from = max(self._valid_from, connection.used)
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
                if turn.get_transaction_status() != extensions.TRANSACTION_STATUS_IDLE:
                    turn.close()
            while self._waiting:
                waiter = self._waiting.popleft()
                if waiter.set_running_or_notify_cancel():
                    waiter.set_result(turn)
                    return
            self._turns.insert(len(self._turns) if turn and not turn.closed else 0, turn)

    def _live_connection(self, turn: Connection | None, deadline: float) -> Connection:
        if turn and not turn.closed and turn.opened >= self._valid_from:
            now = monotonic()
            try:
                turn.poll()  # reads the server's last message, if any
                turn.poll()  # detects that the server closed the connection
                if now > turn.used + PING_AFTER:
                    turn.deadline = min(now + PING_TIMEOUT, (now + deadline) / 2)
                    turn.cursor().execute("SELECT 1")
                return turn
            except Error:
                self._valid_from = max(self._valid_from, now)
        if turn:
            turn.close()  # first, as the server may limit connections
        new = connect(self._config, deadline)
        with self._guard:
            if turn:
                self.putconn(turn, close=True)
            self._opened.append(new)
            self.getconn()  # counts it, and closeall() will close it
        return new

    def _sample(self) -> None:
        while not Event().wait(self._config.metrics_sample_interval):
            with self._guard:
                for turn in filter(None, self._turns):  # also stale ones that nobody takes
                    if turn.opened < self._valid_from:
                        turn.close()
                in_use = self.maxconn - len(self._turns)
                idle = sum(bool(turn and not turn.closed) for turn in self._turns)
            for state, count in (("in_use", in_use), ("idle", idle), ("open", in_use + idle)):
                self._metrics.connections[state].set(count)
