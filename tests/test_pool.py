"""signup/pool.py: several hosts, a failover, the URL's options; turns in order, and none lost."""

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import psycopg2
import pytest
from psycopg2.pool import PoolError

from drills.failover import CLIENTS, SCENARIOS, WORKERS
from signup.config import Config
from signup.metrics import Metrics
from signup.pool import Connection, Pool, connect
from testbed import wait_until
from testbed.database import Cluster, Postgres, execute
from testbed.faults import paused
from testbed.load import Signups
from testbed.network import Relay, address
from testbed.service import Service, user


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


def test_connection_error_names_each_host_and_no_password(cluster: Cluster) -> None:
    standby = urlsplit(cluster.standby.url).query.removeprefix("host=")
    with pytest.raises(psycopg2.OperationalError) as caught:
        opened(f"postgresql://postgres:s3cret@{standby},127.0.0.1:1,nowhere.invalid:1/postgres")
    (line,) = str(caught.value).splitlines()
    for cause in (
        "127.0.0.1 1: Connection refused",
        "session is read-only",
        "nowhere.invalid 1: [Errno -",
    ):
        assert cause in line
    assert "s3cret" not in line


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_signups_follow_the_primary(cluster: Cluster, scenario: str) -> None:
    cluster.rejoin()
    report = SCENARIOS[scenario](cluster)
    assert report["present"] == report["acknowledged"] >= 100
    assert report["stale"] == 0
    if "silent" in scenario:
        assert report["failed"] <= WORKERS
    else:
        assert report["failed"]  # proves that a failover took place
        # Each client may lose the request it has already sent, but no later one.
        assert report["failed later"] <= (CLIENTS if "paused" in scenario else 0)


@pytest.fixture
def relay(postgres: Postgres) -> Iterator[Relay]:
    with Relay(postgres) as relay:
        yield relay


@pytest.fixture
def hanging(relay: Relay) -> Iterator[socket.socket]:
    """A server that accepts and never responds, with the port of `relay` on another address."""
    with socket.create_server(("127.0.0.2", relay.port)) as server:
        yield server


def opened(url: str, seconds: float = 5) -> contextlib.closing[Connection]:
    """Open a connection within `seconds`, and close it after the block."""
    config = Config.from_env({"DATABASE_URL": url})
    return contextlib.closing(connect(config, time.monotonic() + seconds))


def test_hanging_host_or_address_is_skipped(
    url: str, relay: Relay, hanging: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = address(url, relay, relay).replace("@127.0.0.1", "@127.0.0.2")
    with opened(hosts, seconds=30) as connection:
        assert connection.info.host == "127.0.0.1"
        assert time.monotonic() < connection.deadline  # the other host did not take all the time
    found = [(0, 0, 0, "", (number, 0)) for number in ("127.0.0.2", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with opened(address(url, relay).replace("127.0.0.1", "db.example"), seconds=30) as connection:
        assert connection.info.dsn_parameters["hostaddr"] == "127.0.0.1"
        assert time.monotonic() < connection.deadline


def test_connect_timeout_is_enforced(url: str, relay: Relay, hanging: socket.socket) -> None:
    alone = address(url, relay).replace("@127.0.0.1", "@127.0.0.2") + "?connect_timeout=1"
    with ThreadPoolExecutor(1) as executor:
        attempt = executor.submit(opened, alone, seconds=600)
        with pytest.raises(psycopg2.OperationalError, match="did not answer in time"):
            attempt.result(timeout=60)


@pytest.mark.parametrize(
    ("options", "user_timeout", "idle"),
    [("", 15000, 30), ("?tcp_user_timeout=7000&keepalives_idle=11", 7000, 11)],
)
def test_connections_use_keepalive_and_tcp_user_timeout(
    url: str, relay: Relay, options: str, user_timeout: int, idle: int
) -> None:
    with opened(address(url, relay) + options) as connection:
        sock = socket.socket(fileno=os.dup(connection.fileno()))
        with sock:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == user_timeout
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == idle


def test_mismatched_hosts_and_ports_are_refused() -> None:
    with pytest.raises(psycopg2.OperationalError, match="could not match 2 port numbers to 3"):
        opened("postgresql:///signup?host=a,b,c&port=1,2")


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


def test_paused_database_shows_turns_in_use_and_waiting_signups() -> None:
    settings: dict[str, Any] = {"WEB_CONCURRENCY": "1", "METRICS_SAMPLE_INTERVAL": "0.05"}
    clients, most = 20, 4
    with (
        Postgres() as server,
        Service(
            DATABASE_URL=server.new_database(), DATABASE_MAX_CONNECTIONS=str(most), **settings
        ) as service,
        ThreadPoolExecutor(clients) as executor,
    ):
        with paused(server, ""):  # before any connection is open
            answers = [executor.submit(service.signup, json=user(f"{n}")) for n in range(clients)]
            service.wait_for(
                signup_requests_in_flight=clients, database_pool_waiting=clients - most
            )
            now = service.metrics()
            states = [now.get_value("database_connections", state=s) for s in ("in_use", "open")]
            assert states == [most] * 2
        assert {answer.result().status_code for answer in answers} <= {201, 500, 503}
        service.wait_for(database_pool_waiting=0)
        service.quiet_metrics()


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


def test_read_only_error_closes_every_connection_opened_before_it(
    postgres: Postgres, url: str
) -> None:
    pool = Pool(Config.from_env({"DATABASE_URL": url}), 4, Metrics(1))
    with pool.connection(5) as busy:
        with pool.connection(5), pool.connection(5):
            pass
        with (
            pytest.raises(psycopg2.errors.ReadOnlySqlTransaction),
            pool.connection(5) as connection,
            connection.cursor() as cursor,
        ):
            cursor.execute("SET default_transaction_read_only = on")
            cursor.execute("CREATE TABLE refused ()")
        wait_until(lambda: postgres.connections(url) == {busy.info.backend_pid})
        with pool.connection(5) as new:
            pass
    wait_until(lambda: postgres.connections(url) == {new.info.backend_pid})
    pool.closeall()


def test_stale_connections_make_room_for_new_ones(postgres: Postgres, url: str) -> None:
    config = Config.from_env({"DATABASE_URL": url, "METRICS_SAMPLE_INTERVAL": "60"})
    pool = Pool(config, 2, Metrics(1))
    with pool.connection(5), pool.connection(5):
        pass
    execute(postgres.url, f"ALTER ROLE {urlsplit(url).username} CONNECTION LIMIT 2")
    execute(postgres.url, f"SELECT pg_terminate_backend({min(postgres.connections(url))}, 5000)")
    for _ in range(2):
        with pool.connection(5) as first, pool.connection(5) as second:
            wait_until(lambda: len(postgres.connections(url)) == 2)
            assert not first.closed and not second.closed
    pool.closeall()
