"""The database layer under faults: bounded waits, clear errors, no lost signups, recovery."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from shutil import which
from typing import Any

import pytest

from drills.faults import TIMEOUTS, durability_drill, fault_drill
from signup.database import GRACE
from testbed import wait_until
from testbed.database import Postgres, count_users, execute, locked_table, stored_emails
from testbed.faults import FAULTS, end_connections
from testbed.load import Signups
from testbed.pgbouncer import POOL, PgBouncer
from testbed.service import USER, Service, user


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    """A PostgreSQL that tests may break."""
    with Postgres() as server:
        yield server


@pytest.fixture(scope="module")
def fragile_url(server: Postgres) -> str:
    return server.new_database()


@pytest.fixture(scope="module")
def fragile(fragile_url: str) -> Iterator[Service]:
    with Service(DATABASE_URL=fragile_url, WEB_CONCURRENCY="2", **TIMEOUTS) as service:
        service.wait_for(signup_workers=2)
        yield service


@pytest.mark.parametrize("fault", FAULTS)
def test_service_answers_counts_logs_and_survives_a_fault(
    server: Postgres, fragile_url: str, fragile: Service, fault: str
) -> None:
    if fault == "disk full" and not which("prlimit"):
        pytest.skip("needs the program prlimit (util-linux)")
    report = fault_drill(fragile, server, fragile_url, fault, failures=16)
    # The promises are 3 s, with both timeouts at 1 s, and 2 s; this machine may be busy.
    assert report.slowest < 6
    assert report.ready_seconds < 4
    assert report.answers.keys() <= {201, 400, 409, 500, 503}
    assert report.healthz == 200
    answering = fault in ("table locked", "disk full")
    assert report.readyz == (200 if answering else 503)


def test_acknowledged_signups_survive_a_killed_postgresql(
    server: Postgres, fragile_url: str, fragile: Service
) -> None:
    acknowledged, missing = durability_drill(fragile, server, fragile_url, signups=300)
    assert acknowledged >= 300
    assert missing == 0


def test_first_signups_after_lost_connections_return_201(
    server: Postgres, fragile_url: str, fragile: Service
) -> None:
    with ThreadPoolExecutor(8) as executor, locked_table(server.admin_url(fragile_url)):
        requests = [executor.submit(fragile.signup, json=user(f"open{n}")) for n in range(8)]
        wait_until(lambda: len(server.connections(fragile_url)) >= 4)
    assert [request.result().status_code for request in requests] == [201] * 8
    end_connections(server, fragile_url)
    for n in range(16):
        assert fragile.signup(json=user(f"again{n}")).status_code == 201


def test_insert_with_unknown_outcome_is_not_retried(
    server: Postgres, fragile_url: str, fragile: Service
) -> None:
    with ThreadPoolExecutor(1) as executor, locked_table(server.admin_url(fragile_url)):
        request = executor.submit(fragile.signup, json=user("unknown"))
        wait_until(lambda: fragile.metrics().get_value("signup_requests_in_flight"))
        wait_until(lambda: waits_for_the_lock(fragile_url))
        end_connections(server, fragile_url)
    assert request.result().status_code == 500
    assert request.result().json() == {"error": "failed to create user"}
    assert execute(fragile_url, "SELECT 1 FROM users WHERE email = 'unknown@example.com'") == []


def test_connections_are_reused_and_stay_within_the_budget(server: Postgres) -> None:
    url, most = server.new_database(), 0
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="2", DATABASE_MAX_CONNECTIONS="5") as service:
        with Signups(service, clients=12) as load:
            wait_until(lambda: service.answers.total() > 200)
            first = server.connections(url)
            wait_until(lambda: service.answers.total() > 500)
            assert server.connections(url) == first  # no connection was reopened
            service.process.send_signal(signal.SIGHUP)  # old and new workers overlap
            while service.boots() < 4 or service.answers.total() < 800:
                most = max(most, len(server.connections(url)))
                now = service.metrics()
                opened = now.get_value("database_connections", state="open")
                assert opened <= now.get_value("database_connections_max") <= 2 * 5
        assert not load.unanswered
        assert service.answers.keys() == {201, 400, 409}
        assert 2 <= most <= 2 * 5
        service.check_equalities(count_users(url))
        now = service.wait_for(signup_worker_starts_total=4, database_connections_max=2 + 2)
        waits = now.get_value("database_pool_wait_seconds_count")
        assert waits == now.total("database_query_duration_seconds_count")
        state = "database_connections", frozenset({("state", "open")})
        service.first_scrape(lambda now: now[state] == len(server.connections(url)))


def test_statement_timeout_is_the_servers_too(url: str) -> None:
    settings: dict[str, Any] = {"DATABASE_STATEMENT_TIMEOUT": "0.5", "WEB_CONCURRENCY": "1"}
    with Service(DATABASE_URL=url, **settings) as service:
        with locked_table(url):
            assert service.signup(json=USER).status_code == 500
            assert not waits_for_the_lock(url)
        assert "QueryCanceled" in service.log()
        assert service.signup(json=USER).status_code == 201


def test_result_that_arrives_during_a_pause_beyond_the_deadline_counts(server: Postgres) -> None:
    url, seconds = server.new_database(), 1
    settings: dict[str, Any] = {"DATABASE_STATEMENT_TIMEOUT": f"{seconds}", "WEB_CONCURRENCY": "1"}
    with Service(DATABASE_URL=url, **settings) as service, ThreadPoolExecutor(1) as executor:
        (worker,) = service.worker_pids()
        with locked_table(url):
            answer = executor.submit(service.signup, json=USER)
            wait_until(lambda: waits_for_the_lock(url))
            sent = time.monotonic()
            os.kill(worker, signal.SIGSTOP)
        wait_until(lambda: execute(url, "SELECT id FROM users"))
        wait_until(lambda: time.monotonic() > sent + seconds + GRACE)  # beyond the deadline
        os.kill(worker, signal.SIGCONT)
        assert answer.result().status_code == 201
        service.check_equalities(1)


def waits_for_the_lock(url: str) -> bool:
    """Return whether a statement of the role of `url` waits for a lock."""
    return bool(execute(url, "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))


@pytest.fixture
def pgbouncer(postgres: Postgres, url: str) -> Iterator[PgBouncer]:
    """PgBouncer in front of the database in `url`, which bypasses it."""
    with PgBouncer(postgres, url) as pgbouncer:
        yield pgbouncer


@pytest.mark.needs("pgbouncer")
def test_client_connections_of_pgbouncer_share_fewer_server_connections(
    postgres: Postgres, pgbouncer: PgBouncer, url: str
) -> None:
    env: dict[str, Any] = {"WEB_CONCURRENCY": "2", "METRICS_SAMPLE_INTERVAL": "0.05"}
    env["DATABASE_URL"] = pgbouncer.url
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


@pytest.mark.needs("pgbouncer")
def test_statement_timeout_through_pgbouncer_stays_in_the_transaction(
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
        assert service.signup(json=USER).status_code == 201


@pytest.mark.needs("pgbouncer")
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
        assert stored_emails(url).issuperset(load.acknowledged)
