"""The service through PgBouncer in transaction mode, with deploy/pgbouncer.ini."""

import os
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from .load import Load
from .programs import Program, free_port, needs
from .service import ROOT, Postgres, Service, execute, locked_table, wait_until

pytestmark = needs("pgbouncer")

USER = {"email": "ada@example.com", "first_name": "Ada", "last_name": "Lovelace"}
POOL = 3  # connections to PostgreSQL


class PgBouncer(Program):
    """PgBouncer in front of `postgres`, with deploy/pgbouncer.ini but for addresses and size.

    `url` is that of the database which `direct` names.
    """

    def __init__(self, postgres: Postgres, direct: str) -> None:
        self._postgres = postgres
        self._parts = urlsplit(direct)
        self._port = free_port()

    def account(self) -> dict[str, Any]:
        return self._postgres.server.account()  # it refuses to run as root

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
        (self.folder / "pgbouncer.ini").write_text(text.replace("\nsignup =", f"\n{name} ="))
        (self.folder / "userlist.txt").write_text(f'"{user}" "{self._parts.password}"\n')
        if account := self.account():
            os.chown(self.folder, account["user"], account["group"])
        return ["pgbouncer", "pgbouncer.ini"]

    def address(self) -> str | None:
        try:
            socket.create_connection(("127.0.0.1", self._port)).close()
        except ConnectionRefusedError:
            return None
        login = f"{self._parts.username}:{self._parts.password}"
        return f"postgresql://{login}@127.0.0.1:{self._port}{self._parts.path}"


@pytest.fixture
def direct(postgres: Postgres) -> str:
    """The URL of a database without PgBouncer, whose role has the time-out of statements."""
    url = postgres.new_database()
    execute(postgres.url, f"ALTER ROLE {urlsplit(url).username} SET statement_timeout = '1s'")
    return url


@pytest.fixture
def pgbouncer(postgres: Postgres, direct: str) -> Iterator[PgBouncer]:
    with PgBouncer(postgres, direct) as pgbouncer:
        yield pgbouncer


def rows(url: str) -> int:
    return int(execute(url, "SELECT count(*) FROM users")[0][0])


def sessions(postgres: Postgres, direct: str) -> int:
    """PostgreSQL's connections to the database of `direct`."""
    name = urlsplit(direct).path[1:]
    sql = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{name}'"
    return int(execute(postgres.url, sql)[0][0])


def test_many_connections_share_few(postgres: Postgres, pgbouncer: PgBouncer, direct: str) -> None:
    env = {"DATABASE_URL": pgbouncer.url, "WEB_CONCURRENCY": "2", "METRICS_SAMPLE_INTERVAL": "0.05"}
    with Service(**env) as first, Service(**env) as second:
        services = (first, second)
        with Load(first, 16) as load, Load(second, 16, name="other") as other:
            wait_until(lambda: first.answers.total() + second.answers.total() > 1500)
            assert 0 < sessions(postgres, direct) <= POOL
        assert not load.unanswered + other.unanswered
        opened = (s.metrics().get_value("database_connections", state="open") for s in services)
        assert sum(opened) > POOL
        assert rows(direct) == sum(service.answers[201] for service in services)
        for service in services:
            service.check_equalities(service.answers[201])


def test_the_roles_time_out_ends_a_statement(pgbouncer: PgBouncer, direct: str) -> None:
    with Service(DATABASE_URL=pgbouncer.url, WEB_CONCURRENCY="1") as service:
        with locked_table(direct):
            assert service.signup(json=USER).status_code == 500
            assert "canceling statement due to statement timeout" in service.log()
        assert rows(direct) == 0
        answer = service.signup(json=USER)
        assert answer.status_code == 201
        assert answer.json()["user"]["created_at"].endswith("Z")


def test_statements_wait_for_a_connection(pgbouncer: PgBouncer, direct: str) -> None:
    env = {"DATABASE_POOL_TIMEOUT": "1", "DATABASE_STATEMENT_TIMEOUT": "5"}
    with (
        Service(DATABASE_URL=pgbouncer.url, WEB_CONCURRENCY="1", **env) as service,
        ThreadPoolExecutor(POOL * 2) as executor,
    ):
        with locked_table(direct):
            users = [USER | {"email": f"{n}@example.com"} for n in range(POOL * 2)]
            answers = [executor.submit(service.signup, json=user) for user in users]
            # Half of them wait in PostgreSQL for the lock, the others in PgBouncer.
            wait_until(lambda: service.metrics().get_value("signup_requests_in_flight") == POOL * 2)
        assert {answer.result().status_code for answer in answers} <= {201, 500}
        service.check_equalities(rows(direct))


def test_it_is_restarted_under_load(pgbouncer: PgBouncer, direct: str) -> None:
    with Service(DATABASE_URL=pgbouncer.url, WEB_CONCURRENCY="2") as service:
        with Load(service) as load:
            wait_until(lambda: service.answers[201] > 200)
            pgbouncer.stop(signal.SIGKILL)
            wait_until(lambda: service.answers[500] > 20)
            assert service.get("/readyz").status_code == 503
            pgbouncer.start()
            wait_until(lambda: service.get("/readyz").status_code == 200)
            again = service.answers[201] + 200
            wait_until(lambda: service.answers[201] > again)
        stored = {email for (email,) in execute(direct, "SELECT email FROM users")}
        assert stored >= set(load.acknowledged)
