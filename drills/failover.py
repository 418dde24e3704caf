"""`make failover-drill`: a primary fails over to its standby under load, in four ways.

Each of the two servers of testbed/cluster.py is behind a relay, which is its address. The relay
counts the service's open connections to the server, whatever state the server is in.
"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import requests

from signup.pool import PING_AFTER
from testbed import wait_until
from testbed.cluster import Cluster, ask
from testbed.database import locked_table, stored_emails
from testbed.load import Signups
from testbed.relay import Relay
from testbed.service import Client, Service

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


class Load(Signups):
    """Clients that send valid signups."""

    def __init__(self, service: Client, clients: int = CLIENTS) -> None:
        super().__init__(service, clients, f"{time.time_ns()}")

    def step(self, session: requests.Session, number: int, turn: int) -> None:
        if self.sign_up(f"{self._name}-{number}-{turn}@example.com", session).status != 201:
            self._stop.wait(0.05)  # back off after a failure

    def count(self, status: int, since: float = 0) -> int:
        """Return the number of responses with `status` to requests sent after `since`."""
        return sum(a.status == status for a in self.answers if a.sent > since)

    def await_answers(self, count: int, status: int = 201) -> None:
        """Wait for `count` responses with `status` to requests sent from now on."""
        now = time.monotonic()
        wait_until(lambda: self.count(status, now) >= count, timeout=60)

    def report(self, scenario: str, stored: set[str], taken_over: float, stale: int) -> Report:
        assert not self.unanswered
        first = min(a.done for a in self.answers if a.status == 201 and a.done > taken_over)
        failed = [answer for answer in self.answers if answer.status != 201]
        return Report(
            scenario,
            acknowledged=len(self.acknowledged),
            present=len(stored.intersection(self.acknowledged)),
            failed=len(failed),
            recovery=first - taken_over,
            failed_later=sum(answer.sent > first for answer in failed),
            stale=stale,
        )


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
        with Load(service) as load:
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
        return load.report(
            "switch-over, the address moves", _stored(cluster, url), taken_over, stale
        )


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
        with _service(hosts) as service, Load(service) as load:
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
        return load.report(scenario, _stored(cluster, url), taken_over, stale)


def silent(cluster: Cluster) -> Report:
    """A NAT or load balancer drops idle connections without notice to either side."""
    primary, url = cluster.primary, cluster.primary.new_database()
    with Relay(primary) as relay, _service(address(url, relay)) as service:
        with Load(service, 2 * CLIENTS), locked_table(primary.admin_url(url)):
            wait_until(lambda: relay.connections(primary) > CLIENTS)
        opened, idle_since = relay.connections(primary), time.monotonic()
        relay.go_silent()
        wait_until(lambda: time.monotonic() > idle_since + PING_AFTER)
        asked = time.monotonic()
        with Load(service) as load:
            load.await_answers(100)
            stale = _stale(service, relay.silent_connections)
        return load.report(
            f"{opened} idle connections gone silent", _stored(cluster, url), asked, stale
        )


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
    names = ("acknowledged", "present", "failed", "first 201", "failed later", "stale")
    with Cluster() as cluster:
        print(f"{'':32}", *(f"{name:>12}" for name in names))
        for scenario in SCENARIOS:
            cluster.rejoin()
            report = scenario(cluster)
            print(
                f"{report.scenario:32} {report.acknowledged:12} {report.present:12}"
                f" {report.failed:12} {report.recovery:10.2f} s {report.failed_later:12}"
                f" {report.stale:12}",
                flush=True,
            )


if __name__ == "__main__":
    main()
