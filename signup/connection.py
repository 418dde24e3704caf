"""A connection to PostgreSQL whose every wait has a deadline, set by psycopg2's wait callback.

libpq has no time limit on the client's side: a paused server would hold a request forever.
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

DEFAULTS = {  # where the URL leaves them open: the primary of several servers, and an end to
    "target_session_attrs": "read-write",  # connections that a NAT or load balancer has forgotten
    "keepalives_idle": "30",  # seconds
    "keepalives_interval": "5",
    "tcp_user_timeout": "15000",  # milliseconds
}
_failed: dict[str, float] = {}  # when each address failed last


class Connection(extensions.connection):
    """A connection that gives up whatever it waits for at `deadline` (of time.monotonic)."""

    def __init__(self, dsn: str, *, deadline: float) -> None:
        self.opened = self.used = monotonic()
        self.deadline = deadline
        super().__init__(dsn)


def connect(config: Config, deadline: float) -> Connection:
    """A new connection in autocommit mode: one statement is one transaction, one round trip.

    The URL's addresses share the time that is left, and what failed last is tried last: libpq
    would wait for the first one without end. Raises psycopg2.Error when none accepts in time.
    """
    dsn = DEFAULTS | extensions.parse_dsn(config.database_url)
    timeout = round(config.database_statement_timeout * 1000)  # milliseconds
    options = f"-c timezone=UTC -c statement_timeout={timeout} {dsn.get('options', '')}"
    # PgBouncer stumbles over a space at the end of the options.
    dsn |= {"application_name": "signup", "client_encoding": "UTF8", "options": options.strip()}
    causes: list[str] = []
    addresses = sorted(_addresses(dsn, causes), key=lambda address: _failed.get(str(address), 0))
    several = len(addresses) > 1
    most = float(dsn.get("connect_timeout", several)) or inf  # a second for each of several
    for place, address in enumerate(addresses):
        part = min((deadline - monotonic()) / (len(addresses) - place), most)
        factory = partial(Connection, deadline=monotonic() + part)
        try:
            connection: Connection = psycopg2.connect(connection_factory=factory, **dsn | address)
        except psycopg2.Error as error:
            _failed[str(address)] = monotonic()
            name = " ".join(filter(None, address.values())) + ": " if several else ""
            causes.append(name + str(error).strip().partition("\n")[0])
        else:
            connection.deadline, connection.autocommit = deadline, True
            return connection
    text = "; ".join(causes).replace(dsn.get("password") or "\0", "***")  # for the log
    raise psycopg2.OperationalError(text)


def _addresses(dsn: dict[str, str], causes: list[str]) -> Iterator[dict[str, Any]]:
    # libpq would look names up while everybody waits.
    names = ("host", "hostaddr", "port")
    lists = [dsn.get(name, "").split(",") for name in names]
    count = max(map(len, lists))
    if any(len(part) not in (1, count) for part in lists):
        lists, count = [], 0
        yield {}  # libpq says what does not match
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
            causes.append(f"no address of {host!r}: {error.strerror}")


def _wait(connection: Any) -> None:
    # What is raised here closes the connection.
    while (state := connection.poll()) != extensions.POLL_OK:
        event = select.POLLIN if state == extensions.POLL_READ else select.POLLOUT
        poller = select.poll()
        poller.register(connection.fileno(), event)
        left = max(connection.deadline - monotonic(), 0)
        # Twice: after a pause of this process, time is up before what has come is seen.
        if not (poller.poll(left * 1000) or poller.poll(10)):
            raise psycopg2.OperationalError("the database did not answer in time")


extensions.set_wait_callback(_wait)
