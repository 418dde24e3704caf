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
from testbed.database import Postgres, count_users, execute, locked_table
from testbed.faults import FAULTS, end_connections, paused
from testbed.load import Signups
from testbed.service import USER, Service, refused_start, user


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


def test_signup_works_after_a_column_type_change(url: str) -> None:
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="1", DATABASE_MAX_CONNECTIONS="1") as service:
        assert service.signup(json=user("before")).status_code == 201
        execute(url, "ALTER TABLE users ALTER first_name TYPE varchar(100)")
        for n in range(3):
            assert service.signup(json=user(f"after{n}")).status_code == 201
            assert service.signup(json=user(f"AFTER{n}")).status_code == 409


def test_connection_works_after_its_first_insert_failed(url: str) -> None:
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="1", DATABASE_MAX_CONNECTIONS="1") as service:
        execute(url, "ALTER TABLE users ADD CHECK (last_name <> 'Refused')")
        assert service.signup(json=USER | {"last_name": "Refused"}).status_code == 500
        for n in range(3):
            assert service.signup(json=user(f"after{n}")).status_code == 201


def test_metrics_and_healthz_respond_while_signups_wait(url: str) -> None:
    waiting = 40
    with (
        Service(DATABASE_URL=url, WEB_CONCURRENCY="1") as service,
        ThreadPoolExecutor(waiting) as executor,
    ):
        with locked_table(url):
            requests = [executor.submit(service.signup, json=user(f"w{n}")) for n in range(waiting)]
            service.wait_for(signup_requests_in_flight=waiting)
            assert service.get("/healthz").status_code == 200
        assert [request.result().status_code for request in requests] == [201] * waiting


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
    url = server.new_database()
    with Service(
        DATABASE_URL=url,
        WEB_CONCURRENCY="2",
        DATABASE_MAX_CONNECTIONS="5",
    ) as service:
        most = 0
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
        wait_until(
            lambda: (
                service.metrics().get_value("database_connections", state="open")
                == len(server.connections(url))
            )
        )
        now = service.quiet_metrics()
        waits = now.get_value("database_pool_wait_seconds_count")
        assert waits == now.get_value(
            "database_query_duration_seconds_count", operation="insert_user"
        )


@pytest.mark.parametrize("locale", ["C", "builtin C.UTF-8", "tr_TR.utf8"])
def test_email_is_unique_in_any_letter_case_and_locale(postgres: Postgres, locale: str) -> None:
    url = postgres.new_database(locale=locale)
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="1") as service:
        for spellings in (
            ("MIKE@example.com", "mike@example.com", "Mike@Example.COM"),
            ("JOSÉ@example.com", "josé@example.com", "JOSE\u0301@example.com"),
            ("ΣΊΣΥΦΟΣ@example.com", "σίσυφος@example.com", "σίσυφοσ@example.com"),
            ("straße@example.com", "STRASSE@example.com"),
        ):
            statuses = [service.signup(json=USER | {"email": e}).status_code for e in spellings]
            assert statuses == [201] + [409] * (len(spellings) - 1)
        # The email is stored as typed.
        stored = execute(url, "SELECT email FROM users ORDER BY id")
        assert stored[0] == ("MIKE@example.com",)


def test_statement_timeout_is_the_servers_too(url: str) -> None:
    active = (
        "SELECT pid FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%INSERT INTO%'"
    )
    with Service(
        DATABASE_URL=url, WEB_CONCURRENCY="1", DATABASE_STATEMENT_TIMEOUT="0.5"
    ) as service:
        with locked_table(url):
            assert service.signup(json=USER).status_code == 500
            assert execute(url, f"{active} AND pid <> pg_backend_pid()") == []
        assert "QueryCanceled" in service.log()
        assert service.signup(json=USER).status_code == 201


def test_signups_of_a_paused_server_are_rows_that_no_client_was_promised(server: Postgres) -> None:
    url = server.new_database()
    settings: dict[str, Any] = {"DATABASE_STATEMENT_TIMEOUT": "1", "WEB_CONCURRENCY": "1"}
    with Service(DATABASE_URL=url, **settings) as service, ThreadPoolExecutor(6) as executor:
        with locked_table(url):  # so that six connections are open
            first = [executor.submit(service.signup, json=user(f"a{n}")) for n in range(6)]
            wait_until(lambda: len(server.connections(url)) == 6)
        assert [answer.result().status_code for answer in first] == [201] * 6
        with paused(server, url):
            late = [executor.submit(service.signup, json=user(f"b{n}")) for n in range(6)]
            assert [answer.result().status_code for answer in late] == [500] * 6
        wait_until(lambda: count_users(url) == 12)
        counted = service.quiet_metrics().get_value("signup_requests_total", status_code="201")
        assert counted == 6


def test_database_with_another_encoding_than_utf8_is_refused(postgres: Postgres) -> None:
    done = refused_start(DATABASE_URL=postgres.new_database(encoding="SQL_ASCII"))
    line = "the database can't be used: its encoding is not UTF8"
    assert [text for text in done.stderr.splitlines() if not text.startswith("{")] == [line]


def test_start_with_unreachable_database_fails_with_one_line() -> None:
    # A word of the message may be the password: nothing is replaced in it.
    done = refused_start(DATABASE_URL="postgresql://signup:on@127.0.0.1:1/signup")
    line = "the database can't be used: OperationalError: 127.0.0.1 1: Connection refused"
    assert [text for text in done.stderr.splitlines() if not text.startswith("{")] == [line]


def test_result_that_arrives_during_a_pause_beyond_the_deadline_counts(server: Postgres) -> None:
    url, seconds = server.new_database(), 1
    with (
        Service(
            DATABASE_URL=url, WEB_CONCURRENCY="1", DATABASE_STATEMENT_TIMEOUT=str(seconds)
        ) as service,
        ThreadPoolExecutor(1) as executor,
    ):
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
