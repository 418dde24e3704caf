"""Failover to a new primary, several hosts, and the connection options of the URL."""

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import psycopg2
import pytest

from drills.failover import CLIENTS, SCENARIOS, WORKERS, Report, address, silent
from signup.config import Config
from signup.metrics import Metrics
from signup.pool import Connection, Pool, connect
from testbed import wait_until
from testbed.cluster import Cluster
from testbed.database import Postgres, execute
from testbed.relay import Relay


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


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_signups_follow_the_primary(
    cluster: Cluster, scenario: Callable[[Cluster], Report]
) -> None:
    cluster.rejoin()
    report = scenario(cluster)
    assert report.present == report.acknowledged >= 100
    assert report.stale == 0
    if scenario is silent:
        assert report.failed <= WORKERS
    else:
        assert report.failed  # proves that a failover took place
        # Each client may lose the request it has already sent, but no later one.
        assert report.failed_later <= (CLIENTS if scenario.__name__ == "paused" else 0)


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


def test_hanging_host_is_skipped(url: str, relay: Relay, hanging: socket.socket) -> None:
    both = address(url, relay, relay).replace("@127.0.0.1", "@127.0.0.2")
    with opened(both, seconds=1) as connection:
        assert connection.info.host == "127.0.0.1"


def test_every_address_of_a_host_name_is_tried(
    url: str, relay: Relay, hanging: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = [(0, 0, 0, "", (number, 0)) for number in ("127.0.0.2", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: numbers)
    with opened(address(url, relay).replace("127.0.0.1", "db.example"), seconds=1) as connection:
        assert connection.info.dsn_parameters["hostaddr"] == "127.0.0.1"


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
