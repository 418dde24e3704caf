"""The database behind name servers that never respond, behind a slow network, and behind TLS."""

import contextlib
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
import requests

from testbed import wait_until
from testbed.database import Postgres
from testbed.faults import end_connections
from testbed.network import FILES, NAME, Relay, address, mount, namespace
from testbed.nginx import certify
from testbed.pgbouncer import PgBouncer
from testbed.service import USER, Service, project_copy, refused_start, user

from .test_gunicorn import as_nobody

pytestmark = [
    pytest.mark.needs("ip", "openssl", "pgbouncer"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may make namespaces and change users"),
]

CLASSES = {"gevent": ["-k", "gevent"], "gthread": ["-k", "gthread", "--threads=8"]}
SETTINGS: dict[str, Any] = {
    "WEB_CONCURRENCY": "1",
    "DATABASE_POOL_TIMEOUT": "0.5",
    "DATABASE_STATEMENT_TIMEOUT": "0.5",
}
# Promised with them: seconds for a signup, for /readyz, and for a stop (graceful_timeout).
SIGNUP, READY, STOP = 2.0, 2.0, 4.0
SLACK = 1.5  # seconds more, for a busy machine


@pytest.fixture
def network(postgres: Postgres) -> Iterator[Path]:
    """Run the test in a namespace, but not PostgreSQL, which other tests use as well."""
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(namespace())
        except PermissionError as error:  # in a container, for example
            pytest.skip(f"this root may not make namespaces: {error}")
        yield folder


@pytest.fixture
def tls(network: Path) -> dict[str, Any]:
    return certified(network)


def certified(folder: Path) -> dict[str, Any]:
    """Make a certificate, its own authority; return PgBouncer's settings for TLS only."""
    certify(folder)
    key = folder / "tls/privkey.pem"
    key.chmod(0o644)  # PgBouncer does not run as root
    files = {"client_tls_key_file": key, "client_tls_cert_file": key.with_name("fullchain.pem")}
    return {"client_tls_sslmode": "require", **files}


def check(
    status: int, limit: float, request: Callable[..., requests.Response], *args: Any, **options: Any
) -> None:
    """Send a request; it must be answered with `status` within `limit` seconds."""
    started = monotonic()
    assert request(*args, **options).status_code == status
    assert monotonic() - started < limit + SLACK


@pytest.mark.parametrize(
    ("worker_class", "options"),
    [  # with both, a lookup takes 4 seconds; by default, it takes 10 and 20
        ("gevent", "options timeout:2\n"),
        ("gthread", "options timeout:1\nsearch a.example b.example\n"),
    ],
)
def test_times_hold_without_name_servers(
    postgres: Postgres, url: str, network: Path, worker_class: str, options: str
) -> None:
    (network / "resolv.conf").write_text(FILES["resolv.conf"] + options)
    with Relay(postgres) as relay, ThreadPoolExecutor(5) as executor:
        named = address(url, relay).replace("127.0.0.1", NAME)
        with Service(*CLASSES[worker_class], DATABASE_URL=named, **SETTINGS) as service:
            check(201, SIGNUP, service.signup, json=USER)
            (network / "hosts").write_text("")
            end_connections(postgres, url)
            answers = [executor.submit(check, 503, READY, service.get, "/readyz")]
            for number in range(4):
                body = user(f"{number}")
                answers.append(executor.submit(check, 500, SIGNUP, service.signup, json=body))
            while not all(answer.done() for answer in answers):
                check(200, 0, service.get, "/healthz")
            for answer in answers:
                answer.result()
            (network / "hosts").write_text(FILES["hosts"])
            wait_until(lambda: service.signup(json=user("again")).status_code == 201)
            check(200, READY, service.get, "/readyz")


@pytest.mark.parametrize("worker_class", CLASSES)
def test_unknown_name_delays_no_other_host(
    postgres: Postgres, url: str, network: Path, worker_class: str
) -> None:
    with Relay(postgres) as relay:
        both = address(url, relay, relay).replace("127.0.0.1", "unknown.example", 1)
        with Service(*CLASSES[worker_class], DATABASE_URL=both, **SETTINGS) as service:
            for number in range(3):
                end_connections(postgres, url)
                wait_until(lambda: relay.connections(postgres) == 0)  # the service can see it too
                check(201, SIGNUP, service.signup, json=user(f"{number}"))
            started = monotonic()
            assert service.stop() == 0  # while a lookup still waits
            assert monotonic() - started < STOP + SLACK


@pytest.mark.parametrize(
    ("good", "hanging", "seconds"),  # for TLS, SCRAM and the INSERT; one more to pass over a host
    [("127.0.0.1", "127.0.0.2", 1.5), ("127.0.0.2", "127.0.0.1", 2.5)],
)
def test_round_trip_of_200_ms_to_a_name_with_two_addresses(
    postgres: Postgres,
    url: str,
    network: Path,
    tls: dict[str, Any],
    good: str,
    hanging: str,
    seconds: float,
) -> None:
    (network / "hosts").write_text(f"127.0.0.1 {NAME}\n127.0.0.2 {NAME}\n")  # tried in this order
    with (
        PgBouncer(postgres, url, **tls) as pgbouncer,
        Relay(pgbouncer, good, delay=0.1) as relay,
        # Linux drops requests to connect while a server's queue is full.
        socket.create_server((hanging, relay.port), backlog=0) as server,
        socket.create_connection(server.getsockname()),
    ):
        slow = address(url, relay).replace("127.0.0.1", NAME) + "?sslmode=require"
        with Service(DATABASE_URL=slow, WEB_CONCURRENCY="1") as service:
            check(201, seconds, service.signup, json=USER)


def test_system_certificates_verify_the_server(
    postgres: Postgres, url: str, network: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(variable, raising=False)
    trusted, other = certified(network / "trusted"), certified(network / "other")
    (network / "certs").mkdir()
    bundle = network / "certs/ca-certificates.crt"
    bundle.write_bytes(trusted["client_tls_cert_file"].read_bytes())
    subprocess.run(["openssl", "rehash", bundle.parent], check=True)
    mount(bundle.parent, "/etc/ssl/certs")

    options = "?sslmode=verify-full&sslrootcert=system"
    with PgBouncer(postgres, url, **other) as pgbouncer:
        done = refused_start(DATABASE_URL=pgbouncer.url + options)
        assert "certificate verify failed" in done.stderr
    with (
        PgBouncer(postgres, url, **trusted) as pgbouncer,
        Service(DATABASE_URL=pgbouncer.url + options, WEB_CONCURRENCY="1") as service,
    ):
        assert service.signup(json=USER).status_code == 201


@pytest.mark.parametrize("options", ["", "?sslmode=require"])
def test_workers_of_another_user_use_tls(
    postgres: Postgres, url: str, tls: dict[str, Any], tmp_path: Path, options: str
) -> None:
    env = {"HOME": str(tmp_path), "WEB_CONCURRENCY": "1"}  # only root can look in there
    with (
        PgBouncer(postgres, url, **tls) as pgbouncer,
        project_copy() as project,
        as_nobody(project, DATABASE_URL=pgbouncer.url + options, **env) as service,
    ):
        assert service.signup(json=USER).status_code == 201, service.log()
        assert "ERROR" not in service.log()


def test_key_that_workers_can_not_read_is_refused(
    postgres: Postgres, url: str, tls: dict[str, Any], tmp_path: Path
) -> None:
    certificate, key = tls["client_tls_cert_file"], tmp_path / "client.key"
    key.write_bytes(tls["client_tls_key_file"].read_bytes())
    key.chmod(0o600)
    tls["client_tls_ca_file"] = certificate  # PgBouncer would accept it
    options = f"?sslmode=require&sslcert={certificate}&sslkey={key}"
    with PgBouncer(postgres, url, **tls) as pgbouncer, project_copy() as project:
        service = as_nobody(project, DATABASE_URL=pgbouncer.url + options, WEB_CONCURRENCY="1")
        with pytest.raises(AssertionError) as caught, service:
            pass
    (line,) = [line for line in str(caught.value).splitlines() if not line.startswith("{")]
    assert "the database can't be used" in line
    assert str(key) in line
