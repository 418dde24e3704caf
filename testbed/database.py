"""PostgreSQL servers that a test may fill, stop and break, and queries on them."""

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
from signup.pool import connect

from . import wait_until
from .postgres import EmbeddedPostgres
from .programs import is_alive

SYNC_STATE = "SELECT sync_state FROM pg_stat_replication"
BUILTIN_LOCALE = "LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8'"


class Postgres:
    """An embedded PostgreSQL for a `with` block; with the URL of a `primary`, its standby.

    Without `fsync`, which takes most of a commit's time, data survives any kill, but no power cut.
    """

    def __init__(self, primary: str = "", fsync: bool = False) -> None:
        self._primary, self._fsync = primary, fsync

    def __enter__(self) -> Self:
        self._folder = tempfile.mkdtemp(prefix="signup-test-", dir="/tmp")
        Path(self._folder).chmod(0o755)  # started by root, PostgreSQL runs as another user
        self.server = EmbeddedPostgres(Path(self._folder), self._primary)
        self.url = self.server.start()
        if not (self._fsync or self._primary):
            execute(self.url, "ALTER SYSTEM SET fsync = off")
            execute(self.url, "SELECT pg_reload_conf()")
        return self

    def __exit__(self, *_: object) -> None:
        self.signal(signal.SIGCONT)
        if self.server.is_running():
            self.stop("immediate")  # nobody reads the data any more
        self.server.stop()
        shutil.rmtree(self._folder)

    def new_database(self, options: str = BUILTIN_LOCALE) -> str:
        """Create an empty database and an unprivileged role; return the role's URL.

        Without `options` of CREATE DATABASE, it has the locale C and the encoding UTF8.
        """
        name = f"test_{time.monotonic_ns()}"
        execute(self.url, f"CREATE ROLE {name} LOGIN PASSWORD 'right'")
        # The service's times are in UTC, whatever the time zone of its sessions.
        execute(self.url, f"ALTER ROLE {name} SET timezone = 'Asia/Kolkata'")
        execute(self.url, f"CREATE DATABASE {name} TEMPLATE template0 LOCALE 'C' {options}")
        admin = self.url.replace("/postgres?", f"/{name}?")
        execute(admin, f"GRANT CREATE ON SCHEMA public TO {name}")
        return admin.replace("//postgres@", f"//{name}:right@")

    def admin_url(self, url: str) -> str:
        """Return the superuser's URL of the database in `url`."""
        return re.sub("//[^@]*@", "//postgres@", url)

    def dump(self, url: str, *options: str) -> list[str]:
        """Return pg_dump's lines for the database in `url`: by default, all that it contains."""
        file = self.server.home / "socket" / "dump.sql"  # a folder of the server's user
        self.server.run("pg_dump", *options, "--file", file, "--dbname", self.admin_url(url))
        return [line for line in file.read_text().splitlines() if "restrict " not in line]

    def connections(self, url: str) -> set[int]:
        """Return the pids of the backends on the database in `url`, except those of tests."""
        name = urlsplit(url).path[1:]
        sql = f"""SELECT pid FROM pg_stat_activity
            WHERE datname = '{name}' AND application_name <> 'test'"""
        return {pid for (pid,) in execute(self.url, sql)}

    def pids(self) -> list[int]:
        """Return the pids of the postmaster and its children; empty if the server is down."""
        with contextlib.suppress(FileNotFoundError):
            main = int((self.server.data / "postmaster.pid").read_text().splitlines()[0])
            others = Path(f"/proc/{main}/task/{main}/children").read_text().split()
            return [main, *map(int, others)]
        return []

    def signal(self, number: int) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def stop(self, mode: str = "fast") -> None:
        self.server.run("pg_ctl", "-D", self.server.data, "-m", mode, "-w", "stop")

    def kill(self) -> None:
        """SIGKILL every process of the server, even while it is paused, and wait for their exit."""
        pids = self.pids()
        self.signal(signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, pids)))

    def restart(self) -> None:
        """Start the server again after it was stopped or killed."""
        pids = self.pids()
        wait_until(lambda: not any(map(is_alive, pids)))
        self.server.stop()
        assert self.server.start() == self.url


class Cluster:
    """Two servers for a `with` block; `promote` swaps `primary` and `standby`.

    A commit waits for the standby, except on a primary that has none yet, as under Patroni.
    """

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.primary = stack.enter_context(Postgres())
            ask(self.primary, "ALTER SYSTEM SET wal_keep_size = '1GB'")  # for pg_rewind
            ask(self.primary, "SELECT pg_reload_conf()")
            self.standby = stack.enter_context(Postgres(self.primary.url))
            self._replicate()
            self._servers = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        for server in (self.primary, self.standby):
            server.signal(signal.SIGKILL)  # a clean shutdown would wait for the other server
            wait_until(lambda: not server.server.is_running())
        self._servers.close()

    def promote(self) -> None:
        """Promote the standby; return as soon as it accepts writes."""
        new = self.standby
        new.server.run("pg_ctl", "-D", new.server.data, "-W", "promote")
        wait_until(lambda: ask(new, "SELECT pg_is_in_recovery()") == [(False,)], pause=0.01)
        self.primary, self.standby = new, self.primary

    def rejoin(self) -> None:
        """Rewind the former primary and attach it as a standby, unless it already is one."""
        if ask(self.primary, SYNC_STATE) == [("sync",)]:
            return
        self.standby.kill()
        old = self.standby.server
        old.run("pg_rewind", "-D", old.data, "--source-server", self.primary.url, "-R")
        self.standby.restart()
        self._replicate()

    def _replicate(self) -> None:
        set_up = "ALTER SYSTEM SET synchronous_standby_names = '{}'"
        for server, names in ((self.standby, ""), (self.primary, "*")):
            ask(server, set_up.format(names))
            ask(server, "SELECT pg_reload_conf()")
        wait_until(lambda: ask(self.primary, SYNC_STATE) == [("sync",)])


@contextlib.contextmanager
def session(url: str) -> Iterator[Any]:
    """Yield a cursor on a new connection in autocommit mode."""
    config = Config.from_env({"DATABASE_URL": url, "DATABASE_STATEMENT_TIMEOUT": "60"})
    connection = connect(config, deadline=time.monotonic() + 600)
    with contextlib.closing(connection), connection.cursor() as cursor:
        cursor.execute("SET application_name = 'test'")
        yield cursor


def execute(url: str, sql: str) -> list[tuple[Any, ...]]:
    """Run `sql` and return its rows, if any."""
    with session(url) as cursor:
        cursor.execute(sql)
        return cursor.fetchall() if cursor.description else []


def ask(server: Postgres, sql: str) -> list[tuple[Any, ...]]:
    """Run `sql` on `server`, whether it is a primary or a standby."""
    return execute(f"{server.url}&target_session_attrs=any", sql)


@contextlib.contextmanager
def locked_table(url: str) -> Iterator[None]:
    """Lock the table `users` during the block: every other statement on it waits."""
    with session(url) as cursor:
        cursor.execute("BEGIN; LOCK TABLE users")
        yield


@contextlib.contextmanager
def broken_table(url: str) -> Iterator[None]:
    """Make every signup fail during the block, by renaming a column."""
    execute(url, "ALTER TABLE users RENAME COLUMN last_name TO family_name")
    try:
        yield
    finally:
        execute(url, "ALTER TABLE users RENAME COLUMN family_name TO last_name")


def count_users(url: str) -> int:
    return int(execute(url, "SELECT count(*) FROM users")[0][0])


def stored_emails(url: str) -> set[str]:
    return {email for (email,) in execute(url, "SELECT email FROM users")}
