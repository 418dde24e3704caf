"""The connection pool: turns in order, none lost, counted for signups alone; and readiness."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from psycopg2.pool import PoolError

from signup.config import Config
from signup.metrics import Metrics
from signup.pool import Pool
from testbed import wait_until
from testbed.database import Postgres, execute, locked_table
from testbed.faults import paused
from testbed.load import Signups
from testbed.service import Service, user

CONNECTIONS = 4


@pytest.fixture
def pool(url: str) -> Iterator[Pool]:
    """A pool of one connection."""
    pool = Pool(Config.from_env({"DATABASE_URL": url}), 1, Metrics(1))
    yield pool
    pool.closeall()


def waiting(pool: Pool) -> float:
    """Return how many signups wait for the connection of `pool`."""
    (metric,) = pool._metrics.pool_waiting.collect()
    return metric.samples[0].value


def test_waiting_requests_are_served_in_order(pool: Pool) -> None:
    served: list[str] = []

    def use(name: str) -> None:
        with pool.connection(30):
            served.append(name)

    with ThreadPoolExecutor(3) as executor:
        with pool.connection(30):
            waits = []
            for number in range(3):
                waits.append(executor.submit(use, f"waiter {number}"))
                wait_until(lambda: waiting(pool) == len(waits))
        use("newcomer")  # asks before the waiters can wake up
        for wait in waits:
            wait.result()
    assert served == ["waiter 0", "waiter 1", "waiter 2", "newcomer"]


def test_no_failure_loses_a_turn(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    with pool.connection(5):
        # A waiter that is interrupted, as by a signal or a greenlet's end.
        old = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt), pool.connection(30):
            pass
        signal.signal(signal.SIGALRM, old)
        with pytest.raises(PoolError), pool.connection(0.1):
            pass
    with pytest.raises(ZeroDivisionError), pool.connection(5) as connection:
        connection.autocommit = False  # left in a transaction: not fit for the next request
        connection.cursor().execute("SELECT 1")
        raise ZeroDivisionError
    with pool.connection(5) as connection:
        assert connection.autocommit
    with monkeypatch.context() as patch:
        with pool.connection(5) as connection:
            connection.close()
        patch.setattr(pool, "putconn", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError), pool.connection(5):
            pass
    with monkeypatch.context() as patch:
        patch.setattr("signup.pool.connect", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), pool.connection(5):  # none is open any more
            pass
    with pool.connection(5):
        pass


@pytest.fixture
def server() -> Iterator[Postgres]:
    """A PostgreSQL that the test may pause."""
    with Postgres() as server:
        yield server


def test_paused_database_shows_turns_in_use_and_waiting_signups(server: Postgres) -> None:
    url, clients = server.new_database(), 20
    settings: dict[str, Any] = {
        "DATABASE_MAX_CONNECTIONS": str(CONNECTIONS),
        "METRICS_SAMPLE_INTERVAL": "0.05",
    }
    with (
        Service(DATABASE_URL=url, WEB_CONCURRENCY="1", **settings) as service,
        ThreadPoolExecutor(clients) as executor,
    ):
        with paused(server, url):  # before any connection is open
            answers = [executor.submit(service.signup, json=user(f"{n}")) for n in range(clients)]
            service.wait_for(
                signup_requests_in_flight=clients, database_pool_waiting=clients - CONNECTIONS
            )
            now = service.metrics()
            states = [now.get_value("database_connections", state=s) for s in ("in_use", "open")]
            assert states == [CONNECTIONS] * 2
        assert {answer.result().status_code for answer in answers} <= {201, 500, 503}
        service.wait_for(database_pool_waiting=0)
        service.quiet_metrics()


def test_probes_are_not_counted_as_signups_that_wait(url: str) -> None:
    names = ("pool_timeouts_total", "pool_waiting", "pool_wait_seconds_count")

    def pool_metrics() -> list[float]:
        now = service.metrics()
        return [now.get_value(f"database_{name}") for name in names]

    with (
        Service(DATABASE_URL=url, WEB_CONCURRENCY="1", DATABASE_MAX_CONNECTIONS="2") as service,
        ThreadPoolExecutor(6) as executor,
    ):
        assert service.get("/readyz").status_code == 200
        with locked_table(url):
            answers = [executor.submit(service.signup, json=user(f"{n}")) for n in range(2)]
            service.wait_for(signup_requests_in_flight=2, database_pool_wait_seconds_count=2)
            probes = [executor.submit(service.get, "/readyz") for _ in range(4)]
            assert {probe.result().status_code for probe in probes} == {503}
            assert pool_metrics() == [0, 0, 2]
        assert [answer.result().status_code for answer in answers] == [201] * 2
        assert pool_metrics() == [0, 0, 2]


def test_busy_service_whose_signups_are_committed_is_ready(url: str) -> None:
    slow = """
    CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
        'BEGIN PERFORM pg_sleep(0.2); RETURN NEW; END';
    CREATE TRIGGER slow BEFORE INSERT ON users FOR EACH ROW EXECUTE FUNCTION slow()
    """
    settings: dict[str, Any] = {"DATABASE_MAX_CONNECTIONS": "2", "DATABASE_POOL_TIMEOUT": "30"}
    with Service(DATABASE_URL=url, WEB_CONCURRENCY="1", **settings) as service:
        execute(url, slow)
        with Signups(service, clients=40) as load:
            wait_until(lambda: service.metrics().get_value("database_pool_waiting") > 20)
            assert [service.get("/readyz").status_code for _ in range(6)] == [200] * 6
        assert not load.unanswered
        assert service.answers.keys() <= {201, 400, 409}
