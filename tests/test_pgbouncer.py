"""The service through PgBouncer in transaction mode, with deploy/pgbouncer.ini."""

import signal
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest

from testbed import wait_until
from testbed.database import Postgres, count_users, execute, locked_table, stored_emails
from testbed.load import Signups
from testbed.pgbouncer import POOL, PgBouncer
from testbed.service import USER, Service

pytestmark = pytest.mark.needs("pgbouncer")


@pytest.fixture
def pgbouncer(postgres: Postgres, url: str) -> Iterator[PgBouncer]:
    """PgBouncer in front of the database in `url`, which bypasses it."""
    with PgBouncer(postgres, url) as pgbouncer:
        yield pgbouncer


def test_client_connections_share_fewer_server_connections(
    postgres: Postgres, pgbouncer: PgBouncer, url: str
) -> None:
    env: dict[str, Any] = {
        "DATABASE_URL": pgbouncer.url,
        "WEB_CONCURRENCY": "2",
        "METRICS_SAMPLE_INTERVAL": "0.05",
    }
    with Service(**env) as first, Service(**env) as second:
        services = (first, second)
        with Signups(first, 16) as load, Signups(second, 16) as other:
            wait_until(lambda: first.answers.total() + second.answers.total() > 600)
            assert 0 < len(postgres.connections(url)) <= POOL
        assert not load.unanswered + other.unanswered
        opened = (s.metrics().get_value("database_connections", state="open") for s in services)
        assert sum(opened) > POOL
        assert count_users(url) == sum(service.answers[201] for service in services)
        for service in services:
            service.check_equalities(service.answers[201])


def test_statement_timeout_is_enforced_and_stays_in_the_transaction(
    pgbouncer: PgBouncer, url: str
) -> None:
    with Service(
        DATABASE_URL=pgbouncer.url, WEB_CONCURRENCY="1", DATABASE_STATEMENT_TIMEOUT="1"
    ) as service:
        with locked_table(url):
            assert service.signup(json=USER).status_code == 500
            assert "canceling statement due to statement timeout" in service.log()
        assert count_users(url) == 0
        # PgBouncer shares the session with other clients.
        assert execute(pgbouncer.url, "SHOW statement_timeout") == [("0",)]
        answer = service.signup(json=USER)
        assert answer.status_code == 201
        created = answer.json()["user"]["created_at"]
        assert created.endswith("Z")
        ((stored,),) = execute(url, "SELECT created_at FROM users")
        assert datetime.fromisoformat(created) == stored


def test_killed_pgbouncer_loses_no_acknowledged_signup(pgbouncer: PgBouncer, url: str) -> None:
    with Service(DATABASE_URL=pgbouncer.url, WEB_CONCURRENCY="2") as service:
        with Signups(service) as load:
            wait_until(lambda: service.answers[201] > 200)
            pgbouncer.stop(signal.SIGKILL)
            wait_until(lambda: service.answers[500] > 20)
            assert service.get("/readyz").status_code == 503
            pgbouncer.start()
            wait_until(lambda: service.get("/readyz").status_code == 200)
            again = service.answers[201] + 200
            wait_until(lambda: service.answers[201] > again)
        stored = stored_emails(url)
        assert stored >= set(load.acknowledged)
