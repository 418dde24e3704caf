"""A connection to PostgreSQL whose every wait has a deadline, set by psycopg2's wait callback.

libpq has no time limit on the client's side: a paused server would hold a request forever.
"""

import re
import select
import socket
from functools import partial
from time import monotonic
from typing import Any

import psycopg2
from psycopg2 import OperationalError, extensions

from .config import Config


class Connection(extensions.connection):
    """A connection that gives up whatever it waits for at `deadline` (of time.monotonic)."""

    def __init__(self, dsn: str, *, deadline: float) -> None:
        self.deadline = deadline
        super().__init__(dsn)


def connect(config: Config, deadline: float) -> Connection:
    """A new connection in autocommit mode: one statement is one transaction, one round trip.

    Raises psycopg2.Error when the database refuses, or does not answer before `deadline`.
    """
    dsn = extensions.parse_dsn(config.database_url)
    timeout = round(config.database_statement_timeout * 1000)  # milliseconds
    options = f"-c timezone=UTC -c statement_timeout={timeout} {dsn.get('options', '')}"
    dsn |= {"application_name": "signup", "client_encoding": "UTF8", **_addresses(dsn)}
    dsn["options"] = options.strip()  # PgBouncer stumbles over a space at the end
    try:
        factory = partial(Connection, deadline=deadline)
        connection: Connection = psycopg2.connect(connection_factory=factory, **dsn)
    except psycopg2.Error as error:
        password = dsn.get("password")
        if password and password in str(error):  # no log may quote it
            raise OperationalError(str(error).replace(password, "***")) from None
        raise
    connection.autocommit = True
    return connection


def _addresses(dsn: dict[str, str]) -> dict[str, str]:
    """The addresses of the host in `dsn`. libpq would look them up while everybody waits."""
    host = dsn.get("host", "")
    if "hostaddr" in dsn or not re.fullmatch("[^/@,]+", host):  # a Unix socket, or several hosts
        return {}
    try:
        found = socket.getaddrinfo(host, None)
    except OSError as error:
        raise OperationalError(f"no address of {host!r}: {error.strerror}") from error
    addresses = dict.fromkeys(str(address[0]) for *_, address in found)
    return {"host": ",".join([host] * len(addresses)), "hostaddr": ",".join(addresses)}


def _wait(connection: Any) -> None:
    # What is raised here closes the connection.
    while (state := connection.poll()) != extensions.POLL_OK:
        event = select.POLLIN if state == extensions.POLL_READ else select.POLLOUT
        poller = select.poll()
        poller.register(connection.fileno(), event)
        left = max(connection.deadline - monotonic(), 0)
        # Twice: after a pause of this process, time is up before what has come is seen.
        if not (poller.poll(left * 1000) or poller.poll(10)):
            raise OperationalError("the database did not answer in time")


extensions.set_wait_callback(_wait)
