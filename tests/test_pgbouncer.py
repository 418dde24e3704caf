"""The service through PgBouncer in transaction mode, with deploy/pgbouncer.ini."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import pytest

from testbed import wait_until
from testbed.database import Postgres, count_users, execute, locked_table, stored_emails
from testbed.load import Signups
from testbed.pgbouncer import POOL, PgBouncer
from testbed.service import USER, Service, user

pytestmark = pytest.mark.needs("pgbouncer")


@pytest.fixture
def direct(postgres: Postgres) -> str:
    """Return a URL that bypasses PgBouncer."""
    return postgres.new_database()


@pytest.fixture
def pgbouncer(postgres: Postgres, direct: str) -> Iterator[PgBouncer]:
    with PgBouncer(postgres, direct) as pgbouncer:
        yield pgbouncer


def test_client_connections_share_fewer_server_connections(
    postgres: Postgres, pgbouncer: PgBouncer, direct: str
) -> None:
    env: dict[str, Any] = {
        "DATABASE_URL": pgbouncer.url,
        "WEB_CONCURRENCY": "2",
        "METRICS_SAMPLE_INTERVAL": "0.05",
    }
    with Service(**env) as first, Service(**env) as second:
        services = (first, second)
        with Signups(first, 16) as load, Signups(second, 16, name="other") as other:
            wait_until(lambda: first.answers.total() + second.answers.total() > 1500)
            assert 0 < len(postgres.connections(direct)) <= POOL
        assert not load.unanswered + other.unanswered
        opened = (s.metrics().get_value("database_connections", state="open") for s in services)
        assert sum(opened) > POOL
        assert count_users(direct) == sum(service.answers[201] for service in services)
        for service in services:
            service.check_equalities(service.answers[201])


def test_statement_timeout_is_enforced_and_stays_in_the_transaction(
    pgbouncer: PgBouncer, direct: str
) -> None:
    with Service(
        DATABASE_URL=pgbouncer.url, WEB_CONCURRENCY="1", DATABASE_STATEMENT_TIMEOUT="1"
    ) as service:
        with locked_table(direct):
            assert service.signup(json=USER).status_code == 500
            assert "canceling statement due to statement timeout" in service.log()
        assert count_users(direct) == 0
        # PgBouncer shares the session with other clients.
        assert execute(pgbouncer.url, "SHOW statement_timeout") == [("0",)]
        answer = service.signup(json=USER)
        assert answer.status_code == 201
        created = answer.json()["user"]["created_at"]
        assert created.endswith("Z")
        ((stored,),) = execute(direct, "SELECT created_at FROM users")
        assert datetime.fromisoformat(created) == stored


def test_statements_waiting_for_pgbouncer_count_exactly(pgbouncer: PgBouncer, direct: str) -> None:
    env: dict[str, Any] = {"DATABASE_POOL_TIMEOUT": "1", "DATABASE_STATEMENT_TIMEOUT": "5"}
    with (
        Service(DATABASE_URL=pgbouncer.url, WEB_CONCURRENCY="1", **env) as service,
        ThreadPoolExecutor(POOL * 2) as executor,
    ):
        with locked_table(direct):
            users = [user(f"{n}") for n in range(POOL * 2)]
            answers = [executor.submit(service.signup, json=user) for user in users]
            # Half of the statements wait for the lock in PostgreSQL, the others in PgBouncer.
            service.wait_for(signup_requests_in_flight=POOL * 2)
        assert {answer.result().status_code for answer in answers} <= {201, 500}
        service.check_equalities(count_users(direct))


def test_killed_pgbouncer_loses_no_acknowledged_signup(pgbouncer: PgBouncer, direct: str) -> None:
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
        stored = stored_emails(direct)
        assert stored >= set(load.acknowledged)
