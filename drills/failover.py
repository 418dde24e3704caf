"""`make failover-drill`: a primary fails over to its standby under load, in four ways.

Each of the two servers is behind a relay, which is its address. The relay
counts the service's open connections to the server, whatever state the server is in.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

from signup.pool import PING_AFTER
from testbed import wait_until
from testbed.database import Cluster, ask, locked_table, stored_emails
from testbed.load import Signups
from testbed.network import Relay, address
from testbed.service import Service

CLIENTS, WORKERS = 8, 2
# Low, to keep the drill short: a statement sent to a silent server takes their sum plus 1 s.
SETTINGS: dict[str, Any] = {
    "WEB_CONCURRENCY": str(WORKERS),
    "DATABASE_POOL_TIMEOUT": "2",
    "DATABASE_STATEMENT_TIMEOUT": "1",
}


def report(
    cluster: Cluster, url: str, load: Signups, taken_over: float, stale: int
) -> dict[str, float]:
    """Return what a failover did to the clients; docs/reliability.md explains the figures.

    `taken_over` is when the new primary could be reached and written.
    """
    assert not load.unanswered
    name = urlsplit(url).path
    stored = stored_emails(cluster.primary.url.replace("/postgres?", f"{name}?"))
    first = min(a.done for a in load.answers if a.status == 201 and a.done > taken_over)
    failed = [answer for answer in load.answers if answer.status != 201]
    return {
        "acknowledged": len(load.acknowledged),
        "present": len(stored.intersection(load.acknowledged)),
        "failed": len(failed),
        "first 201": first - taken_over,
        "failed later": sum(answer.sent > first for answer in failed),
        "stale": stale,
    }


def switch_over(cluster: Cluster) -> dict[str, float]:
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
        return report(cluster, url, load, taken_over, stale)


def fail_over(cluster: Cluster, number: int) -> dict[str, float]:
    """The primary, the first of two hosts, gets the signal `number`.

    While it is paused, it accepts and never responds; a new service skips it too.
    """
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
        with _service(hosts) as service:
            wait_until(lambda: service.get("/readyz").status_code == 200)
        return report(cluster, url, load, taken_over, stale)


def silent(cluster: Cluster) -> dict[str, float]:
    """A NAT or load balancer drops idle connections without notice to either side."""
    primary, url = cluster.primary, cluster.primary.new_database()
    with Relay(primary) as relay, _service(address(url, relay)) as service:
        with Signups(service, 2 * CLIENTS, valid=True), locked_table(primary.admin_url(url)):
            wait_until(lambda: relay.connections(primary) > CLIENTS)
        idle_since = time.monotonic()
        relay.go_silent()
        wait_until(lambda: time.monotonic() > idle_since + PING_AFTER)
        asked = time.monotonic()
        with Signups(service, CLIENTS, valid=True) as load:
            load.await_answers(100)
            stale = _stale(service, relay.silent_connections)
        return report(cluster, url, load, asked, stale)


SCENARIOS: dict[str, Callable[[Cluster], dict[str, float]]] = {
    "idle connections gone silent": silent,
    "switch-over, the address moves": switch_over,
    "primary killed, two hosts": partial(fail_over, number=signal.SIGKILL),
    "primary paused, two hosts": partial(fail_over, number=signal.SIGSTOP),
}


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


def main() -> None:
    with Cluster() as cluster:
        for name, scenario in SCENARIOS.items():
            cluster.rejoin()
            figures = scenario(cluster)
            if scenario is silent:
                print(f"{'':30}", *(f"{figure:>12}" for figure in figures))
            print(f"{name:30}", *(f"{value:12.4g}" for value in figures.values()), flush=True)


if __name__ == "__main__":
    main()
