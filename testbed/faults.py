"""Database faults: each is a context manager that causes the fault during its block."""

import contextlib
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from urllib.parse import urlsplit

from .database import Postgres, execute, locked_table

Fault = Callable[[Postgres, str], contextlib.AbstractContextManager[None]]
FILE_LIMIT = 17 * 2**20  # bytes; above the size of a WAL segment


def end_connections(postgres: Postgres, url: str) -> None:
    """Terminate every connection to the database in `url`, except those of tests."""
    for pid in postgres.connections(url):
        execute(postgres.url, f"SELECT pg_terminate_backend({pid}, 5000)")


@contextlib.contextmanager
def stopped(postgres: Postgres, url: str) -> Iterator[None]:
    postgres.stop()
    try:
        yield
    finally:
        postgres.restart()


@contextlib.contextmanager
def paused(postgres: Postgres, url: str) -> Iterator[None]:
    postgres.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        postgres.signal(signal.SIGCONT)


@contextlib.contextmanager
def locked(postgres: Postgres, url: str) -> Iterator[None]:
    with locked_table(postgres.admin_url(url)):
        yield


@contextlib.contextmanager
def _role_with(postgres: Postgres, url: str, change: str, back: str) -> Iterator[None]:
    role = urlsplit(url).username
    execute(postgres.url, f"ALTER ROLE {role} {change}")
    end_connections(postgres, url)
    try:
        yield
    finally:
        execute(postgres.url, f"ALTER ROLE {role} {back}")
        end_connections(postgres, url)


SETTING = "default_transaction_read_only"
read_only: Fault = partial(_role_with, change=f"SET {SETTING} = on", back=f"RESET {SETTING}")
too_many_connections: Fault = partial(
    _role_with, change="CONNECTION LIMIT 0", back="CONNECTION LIMIT -1"
)


@contextlib.contextmanager
def wrong_password(postgres: Postgres, url: str) -> Iterator[None]:
    rules = postgres.server.data / "pg_hba.conf"
    trust = rules.read_text()
    rules.write_text("local all postgres trust\nlocal all all scram-sha-256\n")
    execute(postgres.url, "SELECT pg_reload_conf()")
    try:
        with _role_with(postgres, url, "PASSWORD 'other'", "PASSWORD 'right'"):
            yield
    finally:
        rules.write_text(trust)
        execute(postgres.url, "SELECT pg_reload_conf()")


@contextlib.contextmanager
def disk_full(postgres: Postgres, url: str) -> Iterator[None]:
    """Simulate a full disk, for the server alone: no file can grow beyond FILE_LIMIT."""
    admin = postgres.admin_url(url)
    execute(
        admin,
        "INSERT INTO users (email, email_folded, first_name, last_name)"
        " SELECT 'full' || n || '@example.com', 'full' || n || '@example.com',"
        " repeat('x', 99), repeat('y', 99) FROM generate_series(1, 80000) n",
    )
    end_connections(postgres, url)

    def limit(size: int | str) -> None:  # new backends inherit it
        command = ["prlimit", f"--pid={postgres.pids()[0]}", f"--fsize={size}:"]
        subprocess.run(command, check=True, cwd="/", **postgres.server.account())

    limit(FILE_LIMIT)
    try:
        yield
    finally:
        limit("unlimited")
        end_connections(postgres, url)
        execute(admin, "DELETE FROM users WHERE email LIKE 'full%'")


FAULTS: dict[str, Fault] = {
    "stopped": stopped,
    "paused": paused,
    "table locked": locked,
    "too many connections": too_many_connections,
    "wrong password": wrong_password,
    "read-only": read_only,
    "disk full": disk_full,
}
