"""A PostgreSQL that a test may fill, stop and break, and what can be asked of it."""

import contextlib
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from signup.config import Config
from signup.connection import connect

from . import wait_until
from .postgres import EmbeddedPostgres
from .programs import is_alive


class Postgres:
    """An embedded PostgreSQL of its own, by default a primary, gone after the `with` block."""

    def __init__(self, primary: str = "") -> None:
        self._primary = primary

    def __enter__(self) -> Self:
        self._folder = tempfile.mkdtemp(prefix="signup-test-", dir="/tmp")
        Path(self._folder).chmod(0o755)  # under root, PostgreSQL runs as another user
        self.server = EmbeddedPostgres(Path(self._folder), self._primary)
        self.url = self.server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGCONT)
        self.server.stop()
        shutil.rmtree(self._folder)

    def new_database(self, locale: str = "builtin C.UTF-8", encoding: str = "UTF8") -> str:
        """The URL of an empty database, for a role that may just use it.

        `locale` is libc's, or one with its provider in front.
        """
        name = f"test_{time.monotonic_ns()}"
        execute(self.url, f"CREATE ROLE {name} LOGIN PASSWORD 'right'")
        provider, _, other = locale.rpartition(" ")
        options = f"LOCALE_PROVIDER {provider} {provider}_LOCALE '{other}'" if provider else ""
        if encoding != "UTF8":
            options = ""
        execute(
            self.url,
            f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LOCALE 'C' {options}",
        )
        admin = self.url.replace("/postgres?", f"/{name}?")
        execute(admin, f"GRANT CREATE ON SCHEMA public TO {name}")
        return admin.replace("//postgres@", f"//{name}:right@")

    def admin_url(self, url: str) -> str:
        """The administrator's URL of the database that `url` names."""
        return re.sub("//[^@]*@", "//postgres@", url)

    def connections(self, url: str) -> set[int]:
        """The server's processes for connections to the database of `url`, less those of tests."""
        name = urlsplit(url).path[1:]
        sql = f"""SELECT pid FROM pg_stat_activity
            WHERE datname = '{name}' AND application_name <> 'test'"""
        return {pid for (pid,) in execute(self.url, sql)}

    def pids(self) -> list[int]:
        """The server's main process, then its others; nothing where it doesn't run."""
        with contextlib.suppress(FileNotFoundError):
            main = int((self.server.data / "postmaster.pid").read_text().splitlines()[0])
            others = Path(f"/proc/{main}/task/{main}/children").read_text().split()
            return [main, *map(int, others)]
        return []

    def signal(self, number: int) -> None:
        """Send a signal to every process of the server."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self, mode: str = "fast") -> None:
        self.server.run("pg_ctl", "-D", self.server.data, "-m", mode, "-w", "stop")

    def kill(self) -> None:
        """End every process by SIGKILL, also of a server that is paused."""
        pids = self.pids()
        self.signal(signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, pids)))

    def restart(self) -> None:
        """Start the server again after `stop`, or after it was killed."""
        pids = self.pids()
        wait_until(lambda: not any(map(is_alive, pids)))
        self.server.stop()
        assert self.server.start() == self.url


@contextlib.contextmanager
def session(url: str) -> Iterator[Any]:
    """The cursor of a connection of its own, in autocommit mode."""
    config = Config.from_env({"DATABASE_URL": url, "DATABASE_STATEMENT_TIMEOUT": "60"})
    connection = connect(config, deadline=time.monotonic() + 600)
    with contextlib.closing(connection), connection.cursor() as cursor:
        cursor.execute("SET application_name = 'test'")
        yield cursor


def execute(url: str, sql: str) -> list[tuple[Any, ...]]:
    """Run `sql`, and return the rows if there are any."""
    with session(url) as cursor:
        cursor.execute(sql)
        return cursor.fetchall() if cursor.description else []


@contextlib.contextmanager
def locked_table(url: str) -> Iterator[None]:
    """While the block runs, whoever uses the table `users` waits."""
    with session(url) as cursor:
        cursor.execute("BEGIN; LOCK TABLE users")
        yield


@contextlib.contextmanager
def broken_table(url: str) -> Iterator[None]:
    """While the block runs, no signup can be stored."""
    execute(url, "ALTER TABLE users RENAME COLUMN last_name TO family_name")
    try:
        yield
    finally:
        execute(url, "ALTER TABLE users RENAME COLUMN family_name TO last_name")


def count_users(url: str) -> int:
    return int(execute(url, "SELECT count(*) FROM users")[0][0])


def stored_emails(url: str) -> set[str]:
    """Of all users."""
    return {email for (email,) in execute(url, "SELECT email FROM users")}
