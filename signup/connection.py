"""A PostgreSQL connection with a deadline for every wait, enforced by psycopg2's wait callback.

libpq has no client-side timeout: a request to a paused server would never return.
"""

import select
import socket
from collections.abc import Iterator
from functools import partial
from math import inf
from time import monotonic
from typing import Any

import psycopg2
from psycopg2 import extensions

from .config import Config

DEFAULTS = {  # unless the URL sets them
    "target_session_attrs": "read-write",  # connect to the primary only
    "keepalives_idle": "30",  # seconds; detects connections that a NAT or load balancer dropped
    "keepalives_interval": "5",
    "tcp_user_timeout": "15000",  # milliseconds
}
_failed: dict[str, float] = {}  # the time of each address's last failure


class Connection(extensions.connection):
    """A connection whose waits fail at `deadline`, in seconds of time.monotonic()."""

    def __init__(self, dsn: str, *, deadline: float) -> None:
        self.opened = self.used = monotonic()
        self.deadline = deadline
        super().__init__(dsn)


def connect(config: Config, deadline: float) -> Connection:
    """Connect in autocommit mode: one statement is one transaction and one round trip.

    The URL's addresses share the remaining time; the one that failed last is tried last. libpq
    would wait for the first one forever. Raises psycopg2.Error if none accepts by `deadline`.
    """
    dsn = DEFAULTS | extensions.parse_dsn(config.database_url)
    timeout = round(config.database_statement_timeout * 1000)  # milliseconds
    options = f"-c statement_timeout={timeout} {dsn.get('options', '')}"
    # PgBouncer 1.20 and newer reject options that end in a space.
    dsn |= {"application_name": "signup", "client_encoding": "UTF8", "options": options.strip()}
    causes: list[str] = []
    addresses = sorted(_addresses(dsn, causes), key=lambda address: _failed.get(str(address), 0))
    # Seconds; 1 for several addresses.
    limit = float(dsn.get("connect_timeout", len(addresses) > 1)) or inf
    for place, address in enumerate(addresses):
        part = min((deadline - monotonic()) / (len(addresses) - place), limit)
        factory = partial(Connection, deadline=monotonic() + part)
        try:
            connection: Connection = psycopg2.connect(connection_factory=factory, **dsn | address)
        except psycopg2.Error as error:
            _failed[str(address)] = monotonic()
            name = " ".join(dict.fromkeys(filter(None, address.values()))) or "the default server"
            causes.append(name + ": " + str(error).strip().partition("\n")[0])
        else:
            connection.deadline, connection.autocommit = deadline, True
            return connection
    text = "; ".join(causes).replace(dsn.get("password") or "\0", "***")  # it is logged
    raise psycopg2.OperationalError(text)


def _addresses(dsn: dict[str, str], causes: list[str]) -> Iterator[dict[str, Any]]:
    # A lookup by libpq would block all greenlets of the worker.
    names = ("host", "hostaddr", "port")
    lists = [dsn.get(name, "").split(",") for name in names]
    count = max(map(len, lists))
    if any(len(part) not in (1, count) for part in lists):
        lists, count = [], 0
        yield {}  # libpq reports the mismatch
    for values in zip(*(part * (count // len(part)) for part in lists), strict=True):
        address = {name: value or None for name, value in zip(names, values, strict=True)}
        host = address["host"] or "/"
        if address["hostaddr"] or host[0] in "/@":  # a Unix socket
            yield address
            continue
        try:
            for *_, found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM):
                yield address | {"hostaddr": found[0]}
        except OSError as error:
            causes.append(f"cannot resolve {host!r}: {error.strerror}")


def _wait(connection: Any) -> None:
    # psycopg2 closes the connection if this raises.
    while (state := connection.poll()) != extensions.POLL_OK:
        event = select.POLLIN if state == extensions.POLL_READ else select.POLLOUT
        poller = select.poll()
        poller.register(connection.fileno(), event)
        left = max(connection.deadline - monotonic(), 0)
        # Poll twice: after a pause of this process, data may be waiting after the deadline.
        if not (poller.poll(left * 1000) or poller.poll(10)):
            raise psycopg2.OperationalError("the database did not answer in time")


extensions.set_wait_callback(_wait)
