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
from testbed.database import Postgres, execute, locked_table
from testbed.faults import FAULTS, end_connections
from testbed.load import Signups
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


@pytest.mark.parametrize("how", ["restart", "terminate"])
def test_first_signups_after_lost_connections_return_201(
    server: Postgres, fragile_url: str, fragile: Service, how: str
) -> None:
    with ThreadPoolExecutor(8) as executor, locked_table(server.admin_url(fragile_url)):
        requests = [executor.submit(fragile.signup, json=user(f"{how}{n}")) for n in range(8)]
        wait_until(lambda: len(server.connections(fragile_url)) >= 4)
    assert [request.result().status_code for request in requests] == [201] * 8
    if how == "restart":
        server.stop()
        server.restart()
    else:
        end_connections(server, fragile_url)
    for n in range(16):
        assert fragile.signup(json=user(f"{how}-again{n}")).status_code == 201


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
        now = service.quiet_metrics()
        waits = now.get_value("database_pool_wait_seconds_count")
        assert waits == now.total("database_query_duration_seconds_count")
        wait_until(
            lambda: (
                service.metrics().total("database_connections", state="open")
                == len(server.connections(url))
            )
        )


def test_email_is_unique_in_a_locale_that_folds_ascii_only(postgres: Postgres) -> None:
    url = postgres.new_database(options="")  # the other tests have a locale that folds all letters
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="1") as service:
        for email, status in (("MIKE", 201), ("mike", 409), ("JOSÉ", 201), ("jose\u0301", 409)):
            assert service.signup(json=user(email)).status_code == status


def test_statement_timeout_is_the_servers_too(url: str) -> None:
    active = (
        "SELECT pid FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%INSERT INTO%'"
    )
    settings: dict[str, Any] = {"DATABASE_STATEMENT_TIMEOUT": "0.5", "WEB_CONCURRENCY": "1"}
    with Service(DATABASE_URL=url, **settings) as service:
        with locked_table(url):
            assert service.signup(json=USER).status_code == 500
            assert execute(url, f"{active} AND pid <> pg_backend_pid()") == []
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
