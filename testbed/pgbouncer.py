"""PgBouncer between the service and PostgreSQL, with deploy/pgbouncer.ini."""

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from . import ROOT
from .database import Postgres
from .programs import Program, free_port, listens

POOL = 3  # connections to PostgreSQL


class PgBouncer(Program):
    """PgBouncer with deploy/pgbouncer.ini, except for its addresses and pool size.

    `url` leads through PgBouncer to the database in `direct`, a URL of `postgres`. `settings` are
    added to its configuration.
    """

    def __init__(self, postgres: Postgres, direct: str, **settings: str | Path) -> None:
        self._postgres = postgres
        self._settings = "".join(f"{name} = {value}\n" for name, value in settings.items())
        self._parts = urlsplit(direct)
        self._port = free_port()

    def account(self) -> dict[str, Any]:
        return self._postgres.server.account()  # PgBouncer refuses to run as root

    def command(self) -> list[str]:
        user, name = self._parts.username, self._parts.path[1:]
        text = (ROOT / "deploy/pgbouncer.ini").read_text()
        for setting, value in (
            ("signup", f"host={parse_qs(self._parts.query)['host'][0]}"),
            ("listen_addr", "127.0.0.1"),
            ("listen_port", str(self._port)),
            ("default_pool_size", str(POOL)),
        ):
            text, count = re.subn(rf"(?m)^{setting} = .*", f"{setting} = {value}", text)
            assert count == 1
        text = text.replace("\nsignup =", f"\n{name} =") + self._settings
        (self.folder / "pgbouncer.ini").write_text(text)
        (self.folder / "userlist.txt").write_text(f'"{user}" "{self._parts.password}"\n')
        if account := self.account():
            os.chown(self.folder, account["user"], account["group"])
        return ["pgbouncer", "pgbouncer.ini"]

    def address(self) -> str | None:
        login = f"{self._parts.username}:{self._parts.password}"
        url = f"postgresql://{login}@127.0.0.1:{self._port}{self._parts.path}"
        return url if listens(self._port) else None
