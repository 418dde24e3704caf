"""A primary and its synchronous standby, which can swap roles."""

import signal
from contextlib import ExitStack
from typing import Any, Self

from . import wait_until
from .database import Postgres, execute

SYNC_STATE = "SELECT sync_state FROM pg_stat_replication"


class Cluster:
    """Two servers for a `with` block; `promote` swaps `primary` and `standby`.

    A commit waits for the standby, except on a primary that has none yet, as under Patroni.
    """

    def __enter__(self) -> Self:
        with ExitStack() as stack:
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


def ask(server: Postgres, sql: str) -> list[tuple[Any, ...]]:
    """Run `sql` on `server`, whether it is a primary or a standby."""
    return execute(f"{server.url}&target_session_attrs=any", sql)
