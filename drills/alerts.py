"""`make alert-drill`: causes the alerts, and waits for each to fire and to resolve.

A real service under steady traffic, behind a real nginx, with a real blackbox exporter, Prometheus
and Alertmanager. Thresholds are those of the rules; WAITS shortens the durations. Not caused are
SignupSlowScrape (here, a scrape times out before it counts as slow), SignupRequestsInFlightHigh
(it takes 800 clients per worker), and the alerts on the monitoring itself that need a broken disk,
network or receiver.
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

import requests

from testbed import wait_until
from testbed.database import Postgres, locked_table
from testbed.faults import locked, stopped
from testbed.load import Repeated, Signups
from testbed.monitoring import Alertmanager, BlackboxExporter, Prometheus
from testbed.nginx import Nginx
from testbed.programs import free_port
from testbed.service import Client, Service

# Windows, offsets and `for` durations of the rules, and their values here.
WAITS = {"1m": "1s", "2m": "2s", "3m": "3s", "5m": "5s", "10m": "10s", "15m": "10s", "30m": "10s"}
WAITS |= {"1h": "12s", "3h": "6s", "6h": "20s", "24h": "20s", "3d": "30s", "30d": "60s"}
INTERVAL = "250ms"  # of scrapes and evaluations; 15 s in production
CLIENTS = 40  # more than the pool has connections
REQUESTS = 16  # per second


def shorten(rules: str) -> str:
    """Return the text of a rule file with the durations of WAITS."""
    rules = re.sub(r"keep_firing_for: \w+", "keep_firing_for: 2s", rules)
    durations = r"(\[|offset | for: |interval: )(\d+[smhd])\b"
    return re.sub(durations, lambda found: found[1] + WAITS[found[2]], rules)


class Traffic(Signups):
    """A steady stream of signups.

    `rate` is in requests per second. `special`, if set, is the email of one in `every` requests.
    """

    rate, every = REQUESTS, 2
    special: str | None = None

    def step(self, session: requests.Session, number: int, turn: int) -> None:
        if not self.rate:
            time.sleep(0.1)
            return
        time.sleep((CLIENTS if turn else number) / self.rate)
        is_special = self.special and (number + turn) % self.every == 0
        new = f"{number}-{turn}-{time.time_ns()}@example.com"
        self.sign_up(str(self.special) if is_special else new)

    @contextlib.contextmanager
    def changed(self, **settings: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in settings}
        self.__dict__.update(settings)
        yield
        self.__dict__.update(before)


def lock(url: str, seconds: float = 2) -> Repeated:
    """Lock the table `users` for `seconds` at a time, repeatedly."""

    def once() -> None:
        with locked_table(url):
            time.sleep(seconds)

    return Repeated(once)


class Deployment:
    """Two replicas of the service, with 4 workers and with 1, a proxy, and the monitoring."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._postgres = stack.enter_context(Postgres())
            self._url = self._postgres.new_database()
            self.admin_url = self._postgres.admin_url(self._url)
            self.alertmanager = stack.enter_context(Alertmanager())
            prober = stack.enter_context(BlackboxExporter())
            self.prometheus = stack.enter_context(
                Prometheus(INTERVAL, shorten, self.alertmanager, prober)
            )
            self.prometheus.set_targets("prometheus", self.prometheus.url)
            self._services = stack.enter_context(ExitStack())
            self._first = Client()
            self._start()
            self.traffic = stack.enter_context(Traffic(self._first, CLIENTS))
            steady = f"job:signup_requests:rate5m > {REQUESTS / 2}"
            wait_until(lambda: self.prometheus.query(steady))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        """Start the service and the proxy on new ports, and stop the old ones."""
        self._services.close()
        self._replicas = [
            self._services.enter_context(self._replica(workers)) for workers in ("4", "1")
        ]
        self._first.url = self._replicas[0].url  # which gets the traffic
        self._scrape()
        self._proxy = self._services.enter_context(Nginx(*self._replicas))
        self.prometheus.set_probe_target(self._proxy.url)

    def _replica(self, workers: str, port: int = 0) -> Service:
        """Return a replica that is not started yet."""
        return Service(
            port=port,
            DATABASE_URL=self._url,
            WEB_CONCURRENCY=workers,
            METRICS_SAMPLE_INTERVAL="0.1",
            DATABASE_POOL_TIMEOUT="0.5",
            DATABASE_STATEMENT_TIMEOUT="3",
        )

    def _scrape(self, *others: str) -> None:
        """Make Prometheus scrape the replicas and `others`."""
        urls = [replica.url for replica in self._replicas]
        self.prometheus.set_targets("signup-server", *urls, *others)

    def causes(self) -> dict[str, tuple[Callable[[], AbstractContextManager[Any]], str]]:
        """Return each cause by name, as a context manager, with the alerts that it must fire."""
        url, postgres, traffic = self._url, self._postgres, self.traffic
        return {
            "half of the requests invalid": (
                lambda: traffic.changed(special="bad"),
                "SignupHighErrorRate SignupHighValidationErrors",
            ),
            "half of the emails duplicate": (
                lambda: traffic.changed(special="twice@example.com"),
                "SignupHighDuplicateEmails",
            ),
            "database stopped": (
                lambda: stopped(postgres, url),
                "SignupDatabaseErrors SignupHighServerErrors SignupAvailabilityBudgetBurnFast"
                " SignupAvailabilityBudgetBurnSlow",
            ),
            "table locked, many clients": (
                self._pool_exhausted,
                "SignupDatabaseConnectionsHigh SignupDatabaseConnectionsElevated"
                " SignupDatabasePoolTimeouts SignupPoolWaitHigh",
            ),
            "table locked for 2 s at a time": (
                lambda: lock(self.admin_url),
                "SignupSlowDatabaseQueries SignupVerySlowDatabaseQueries SignupSlowLatency"
                " SignupVerySlowLatency SignupLatencyBudgetBurnFast SignupLatencyBudgetBurnSlow",
            ),
            "four times the traffic": (
                lambda: traffic.changed(rate=REQUESTS * 4),
                "SignupTrafficSpike",
            ),
            "a worker killed repeatedly": (
                lambda: Repeated(self._kill_newest_worker),
                "SignupWorkerRestartLoop",
            ),
            "a replica restarted repeatedly": (self._restarts, "SignupRestartLoop"),
            "wrong server scraped": (
                lambda: self._scraped_too(self.prometheus.url),
                "SignupMetricsMissing",
            ),
            "traffic stopped": (
                lambda: traffic.changed(rate=0),
                "SignupTrafficDrop SignupNoSignups",
            ),
            "a replica stopped": (
                lambda: self._down(1),
                "SignupInstanceDown SignupReplicasMissing",
            ),
            "proxy stopped": (self._no_proxy, "SignupUnreachable"),
            "service stopped": (
                lambda: self._down(0, 1),
                "SignupServiceDown SignupUnreachable",
            ),
            "cAdvisor stopped": (self._no_cadvisor, "PrometheusTargetMissing"),
            "prometheus.yml invalid": (
                self._wrong_configuration,
                "PrometheusConfigurationReloadFailure",
            ),
        }

    @contextlib.contextmanager
    def _pool_exhausted(self) -> Iterator[None]:
        with self.traffic.changed(rate=REQUESTS * 10), locked(self._postgres, self._url):
            yield

    def _kill_newest_worker(self) -> None:
        """Kill it once it has started; scrapes reach the others."""
        newest = self._replicas[0].worker_pids()[-1]
        if self._replicas[0].metric_files(newest):
            os.kill(newest, signal.SIGKILL)
        time.sleep(0.05)

    @contextlib.contextmanager
    def _restarts(self) -> Iterator[None]:
        """Repeatedly start a replica on one port, and stop it once it has been scraped."""
        port = free_port()
        is_up = f'up{{instance="127.0.0.1:{port}"}} == 1'

        def once() -> None:
            with self._replica("1", port):
                wait_until(lambda: self.prometheus.query(is_up))

        with self._scraped_too(f"http://127.0.0.1:{port}"), Repeated(once):
            yield

    @contextlib.contextmanager
    def _scraped_too(self, url: str) -> Iterator[None]:
        self._scrape(url)
        yield
        self._scrape()

    @contextlib.contextmanager
    def _down(self, *replicas: int) -> Iterator[None]:
        for replica in replicas:
            self._replicas[replica].stop()
        yield
        self._start()

    @contextlib.contextmanager
    def _no_proxy(self) -> Iterator[None]:
        self._proxy.stop()
        yield
        self._proxy.start()
        self.prometheus.set_probe_target(self._proxy.url)

    @contextlib.contextmanager
    def _no_cadvisor(self) -> Iterator[None]:
        self.prometheus.set_targets("cadvisor", f"http://127.0.0.1:{free_port()}")
        yield
        self.prometheus.set_targets("cadvisor")

    @contextlib.contextmanager
    def _wrong_configuration(self) -> Iterator[None]:
        file = self.prometheus.folder / "prometheus.yml"
        right = file.read_text()
        file.write_text("wrong")
        self.prometheus.reload()
        yield
        file.write_text(right)
        self.prometheus.reload()

    def run(self, cause: str, alerts: str) -> tuple[dict[str, float], dict[str, float]]:
        """Apply the cause until these alerts fire, then remove it and wait until they resolve.

        Returns when each reached Alertmanager, in seconds from the start of the cause, and when it
        resolved there, in seconds from its end.
        """
        block, _ = self.causes()[cause]
        self._wait(alerts, False, 0)
        begin = time.monotonic()
        with block():
            fired = self._wait(alerts, True, begin)
        return fired, self._wait(alerts, False, time.monotonic())

    def _wait(self, alerts: str, present: bool, since: float) -> dict[str, float]:
        """Wait until each alert is present, or absent; return how long after `since` it was so."""
        times: dict[str, float] = {}
        names = alerts.split()

        def others() -> set[str]:
            now = self.alertmanager.alerts()
            return {name for name in names if (name in now) == present} - times.keys()

        while len(times) < len(names):
            for alert in wait_until(others, timeout=90):
                times[alert] = time.monotonic() - since
        return times


def main() -> None:
    """Print a row for each alert."""
    print(f"{'alert':38}{'cause':38}{'fired after':>11}{'resolved after':>16}")
    with Deployment() as deployment:
        for cause, (_, alerts) in deployment.causes().items():
            fired, resolved = deployment.run(cause, alerts)
            for alert in fired:
                times = f"{fired[alert]:9.1f} s{resolved[alert]:14.1f} s"
                print(f"{alert:38}{cause:38}{times}", flush=True)


if __name__ == "__main__":
    main()
