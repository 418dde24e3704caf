"""`make failover-drill`: a primary fails over to its standby under load, in four ways.

Each of the two servers of testbed/cluster.py is behind a relay, which is its address. The relay
counts the service's open connections to the server, whatever state the server is in.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import urlsplit

from signup.pool import PING_AFTER
from testbed import wait_until
from testbed.cluster import Cluster, ask
from testbed.database import locked_table, stored_emails
from testbed.load import Signups
from testbed.relay import Relay
from testbed.service import Service

CLIENTS, WORKERS = 8, 2
# Low, to keep the drill short: a statement sent to a silent server takes their sum plus 1 s.
SETTINGS: dict[str, Any] = {
    "WEB_CONCURRENCY": str(WORKERS),
    "DATABASE_POOL_TIMEOUT": "2",
    "DATABASE_STATEMENT_TIMEOUT": "1",
}


@dataclass
class Report:
    """What one failover did to the clients.

    `recovery` is the time from when the new primary can be reached and written to the first 201,
    in seconds. `failed_later` counts the failed requests that were sent after that 201, and `stale`
    the connections that the service still has to the former primary.
    """

    scenario: str
    acknowledged: int
    present: int
    failed: int
    recovery: float
    failed_later: int
    stale: int


def summary(
    load: Signups, scenario: str, stored: set[str], taken_over: float, stale: int
) -> Report:
    assert not load.unanswered
    first = min(a.done for a in load.answers if a.status == 201 and a.done > taken_over)
    failed = [answer for answer in load.answers if answer.status != 201]
    present = stored.intersection(load.acknowledged)
    later = sum(answer.sent > first for answer in failed)
    counts = len(load.acknowledged), len(present), len(failed)
    return Report(scenario, *counts, first - taken_over, later, stale)


def address(url: str, *relays: Relay) -> str:
    """Return the URL of the same database through `relays`."""
    parts = urlsplit(url)
    login = f"{parts.username}:{parts.password}"
    hosts = ",".join(f"127.0.0.1:{relay.port}" for relay in relays)
    attributes = "?target_session_attrs=read-write" if len(relays) > 1 else ""
    return f"postgresql://{login}@{hosts}{parts.path}{attributes}"


def switch_over(cluster: Cluster) -> Report:
    """Planned: the primary becomes read-only, its address moves, and it rejoins as a standby."""
    old, url = cluster.primary, cluster.primary.new_database()
    with Relay(old) as relay, _service(address(url, relay)) as service:
        with Signups(service, CLIENTS, valid=True) as load:
            load.await_answers(100)
            ask(old, "ALTER SYSTEM SET default_transaction_read_only = on")
            ask(old, "SELECT pg_reload_conf()")
            load.await_answers(CLIENTS, status=500)
            assert service.get("/readyz").status_code == 503
            cluster.promote()
            relay.move(cluster.primary)
            taken_over = time.monotonic()
            load.await_answers(100)
            stale = _stale(service, lambda: relay.connections(old))
            ask(old, "ALTER SYSTEM RESET default_transaction_read_only")
            old.stop()
            cluster.rejoin()
            load.await_answers(100)
        name = "switch-over, the address moves"
        return summary(load, name, _stored(cluster, url), taken_over, stale)


def killed(cluster: Cluster) -> Report:
    """The primary, the first of two hosts, is killed by SIGKILL."""
    return _failover(cluster, "primary killed, two hosts", signal.SIGKILL)


def paused(cluster: Cluster) -> Report:
    """The primary, the first of two hosts, is paused: it accepts and never responds."""
    return _failover(cluster, "primary paused, two hosts", signal.SIGSTOP)


def _failover(cluster: Cluster, scenario: str, number: int) -> Report:
    old, url = cluster.primary, cluster.primary.new_database()
    with Relay(old) as first, Relay(cluster.standby) as second:
        hosts = address(url, first, second)
        with _service(hosts) as service, Signups(service, CLIENTS, valid=True) as load:
            load.await_answers(100)
            old.signal(number)
            load.await_answers(1, status=500)
            cluster.promote()
            taken_over = time.monotonic()
            load.await_answers(100)
            stale = _stale(service, lambda: first.connections(old))
        if number == signal.SIGSTOP:  # a new service skips the paused host too
            with _service(hosts) as service:
                assert service.get("/readyz").status_code == 200
        return summary(load, scenario, _stored(cluster, url), taken_over, stale)


def silent(cluster: Cluster) -> Report:
    """A NAT or load balancer drops idle connections without notice to either side."""
    primary, url = cluster.primary, cluster.primary.new_database()
    with Relay(primary) as relay, _service(address(url, relay)) as service:
        with Signups(service, 2 * CLIENTS, valid=True), locked_table(primary.admin_url(url)):
            wait_until(lambda: relay.connections(primary) > CLIENTS)
        opened, idle_since = relay.connections(primary), time.monotonic()
        relay.go_silent()
        wait_until(lambda: time.monotonic() > idle_since + PING_AFTER)
        asked = time.monotonic()
        with Signups(service, CLIENTS, valid=True) as load:
            load.await_answers(100)
            stale = _stale(service, relay.silent_connections)
        name = f"{opened} idle connections gone silent"
        return summary(load, name, _stored(cluster, url), asked, stale)


SCENARIOS = (silent, switch_over, killed, paused)


@contextmanager
def _service(url: str) -> Iterator[Service]:
    with Service(DATABASE_URL=url, **SETTINGS) as service:
        service.wait_for(signup_workers=WORKERS)
        yield service


def _stale(service: Service, count: Callable[[], int]) -> int:
    """Return `count()` once the service is ready and it is 0, or after 10 more seconds."""
    wait_until(lambda: service.get("/readyz").status_code == 200)
    with suppress(AssertionError):  # each /readyz may reach another worker
        wait_until(lambda: service.get("/readyz").ok and not count(), timeout=10)
    return count()


def _stored(cluster: Cluster, url: str) -> set[str]:
    name = urlsplit(url).path
    return stored_emails(cluster.primary.url.replace("/postgres?", f"{name}?"))


def main() -> None:
    """Print a row for each scenario."""
    with Cluster() as cluster:
        print(f"{'':32}", *(f"{figure.name:>12}" for figure in fields(Report)[1:]))
        for scenario in SCENARIOS:
            cluster.rejoin()
            name, *figures = vars(scenario(cluster)).values()
            print(f"{name:32}", *(f"{figure:12.4g}" for figure in figures), flush=True)


if __name__ == "__main__":
    main()
