"""A PostgreSQL connection whose every wait has a deadline; libpq's own might never return."""

import os
import select
import socket
import ssl
from concurrent.futures import Future
from math import inf
from threading import Thread
from time import monotonic
from typing import Any

import psycopg2
from psycopg2 import extensions

from .config import Config

DEFAULTS = {  # unless the URL sets them
    "application_name": "signup",
    "target_session_attrs": "read-write",  # connect to the primary only
    "keepalives_idle": "30",  # seconds; detects connections that a NAT or load balancer dropped
    "keepalives_interval": "5",
    "tcp_user_timeout": "15000",  # milliseconds
}
SILENCE = 1.0  # seconds without progress, after which the next address is tried
_failed: dict[str, float] = {}  # the time of each address's last failure
_lookups: dict[str, Future[list[str]]] = {}  # the latest lookup of each name

# sslrootcert=system: else the OpenSSL of psycopg2's wheel searches a folder of its build machine.
_paths = ssl.get_default_verify_paths()
os.environ.setdefault("SSL_CERT_FILE", _paths.openssl_cafile)
os.environ.setdefault("SSL_CERT_DIR", _paths.openssl_capath)


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
    targets, causes = _targets(dsn), []
    # All at once: one dead name must not delay the others.
    names = {each["host"] for each in targets if each.get("host") and not each["hostaddr"]}
    lookups = {name: _look_up(name) for name in names if name[0] not in "/@"}  # not a Unix socket
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
            cause = str(error).strip() or "no answer in time"
            causes.append(f"{place}: {cause.splitlines()[0]}")
    raise psycopg2.OperationalError("; ".join(causes))


def _targets(dsn: dict[str, str]) -> list[dict[str, str]]:
    lists = {
        name: (dsn.get(name) or os.environ.get(f"PG{name.upper()}", "")).split(",")
        for name in ("host", "hostaddr", "port")
    }
    count = max(map(len, lists.values()))
    if any(len(each) not in (1, count) for each in lists.values()):
        return [{}]  # libpq reports the mismatch
    return [{name: (each * count)[n] for name, each in lists.items()} for n in range(count)]


def _look_up(name: str) -> Future[list[str]]:
    """Start a lookup, or join the one under way: silent name servers hold one thread per name."""

    def resolve() -> None:
        try:
            found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
            lookup.set_result([str(address[0]) for *_, address in found])
        except Exception as error:
            lookup.set_exception(error)

    if name not in _lookups or _lookups[name].done():
        lookup: Future[list[str]] = Future()
        Thread(target=resolve, daemon=True).start()
        _lookups[name] = lookup
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
            raise psycopg2.OperationalError("the database did not answer in time")


extensions.set_wait_callback(_wait)
