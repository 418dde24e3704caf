"""`make alert-drill`: causes the alerts, and waits for each to fire and to resolve.

A real service under steady traffic, behind a real nginx, with a real blackbox exporter, Prometheus
and Alertmanager. Thresholds are those of the rules; WAITS shortens the durations. Not caused are
SignupProxyRejecting and SignupCertificateExpires, and the alerts on the monitoring itself that need
a broken disk, network or receiver.
"""

import contextlib
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Self

import requests

from testbed import wait_until
from testbed.database import Postgres
from testbed.faults import locked, stopped
from testbed.load import Repeated, Signups
from testbed.monitoring import Alertmanager, BlackboxExporter, Prometheus
from testbed.nginx import Nginx
from testbed.programs import free_port
from testbed.service import Client, Service

# Windows, offsets and `for` durations of the rules, and their values here. An hour is long enough
# for five starts of a replica on a busy machine, and for the rate of a spike to rise within it.
WAITS = {"1m": "1s", "2m": "2s", "3m": "3s", "5m": "5s", "7m": "7s", "10m": "10s"}
WAITS |= {"15m": "10s", "30m": "10s", "1h": "30s", "2h": "40s", "3h": "6s", "6h": "20s"}
WAITS |= {"24h": "20s", "1d": "20s", "3d": "30s", "30d": "60s"}
INTERVAL = "250ms"  # of scrapes and evaluations; 15 s in production
CLIENTS = 40  # more than the pool has connections
REQUESTS = 16  # per second
# Each cause, and the alerts that it must fire. For half a minute before the spike, traffic is even:
# a burst, as after a lock, would be its baseline.
CAUSED = {
    "half of the requests invalid": "SignupHighErrorRate SignupHighValidationErrors",
    "half of the emails duplicate": "SignupHighDuplicateEmails",
    "four times the traffic": "SignupTrafficSpike",
    "database stopped": "SignupNotReady SignupDatabaseErrors SignupHighServerErrors"
    " SignupBudgetBurnFast SignupBudgetBurnSlow",
    "table locked, many clients": "SignupDatabaseConnectionsHigh SignupDatabaseConnectionsElevated",
    "table locked for 2 s at a time": "SignupSlowDatabaseQueries SignupVerySlowDatabaseQueries"
    " SignupSlowLatency SignupVerySlowLatency SignupBudgetBurnFast SignupBudgetBurnSlow",
    "a worker killed repeatedly": "SignupRestartLoop",
    "a replica restarted repeatedly": "SignupRestartLoop",
    "traffic stopped": "SignupTrafficDrop SignupNoSignups",
    "a replica stopped": "SignupInstanceDown",
    "a replica gone": "SignupReplicasMissing",
    "readiness not probed": "SignupProberMissing",
    "proxy stopped": "SignupUnreachable",
    "proxy stopped again and again": "SignupUnreachable SignupProbesDegraded",
    "service stopped": "SignupServiceDown SignupUnreachable",
    "cAdvisor stopped": "PrometheusTargetMissing",
    "prometheus.yml invalid": "ConfigurationReloadFailure",
}


def shorten(rules: str) -> str:
    """Return the text of a rule file with the durations of WAITS."""
    rules = re.sub(r"keep_firing_for: \w+", "keep_firing_for: 2s", rules)
    rules = rules.replace("for: 1h", "for: 10m")
    rules = rules.replace("- 0.15, 0)", "- 9, 0)")  # the prober's, as frequent as scrapes
    durations = r"(\[|offset | for: |interval: )(\d+[smhd])\b"
    return re.sub(durations, lambda found: found[1] + WAITS[found[2]], rules)


class Traffic(Signups):
    """`rate` signups per second; the email of every other one is `special`, if that is set."""

    rate = REQUESTS
    special: str | None = None

    def step(self, session: requests.Session, number: int, turn: int) -> None:
        if not self.rate:
            time.sleep(0.1)
            return
        time.sleep((CLIENTS if turn else number) / self.rate)
        is_special = self.special and (number + turn) % 2 == 0
        new = f"{number}-{turn}-{time.time_ns()}@example.com"
        self.sign_up(str(self.special) if is_special else new)

    @contextlib.contextmanager
    def changed(self, **settings: Any) -> Iterator[None]:
        before = {name: getattr(self, name) for name in settings}
        self.__dict__.update(settings)
        yield
        self.__dict__.update(before)


class Deployment:
    """Two replicas of the service, with 4 workers and with 1, a proxy, and the monitoring."""

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._postgres = stack.enter_context(Postgres())
            self._url = self._postgres.new_database()
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
        self._replicas = [self._services.enter_context(self._replica(n)) for n in ("4", "1")]
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

    def _scrape(self) -> None:
        """Make Prometheus scrape the replicas, and ask their /readyz."""
        for job in ("signup-server", "signup-ready"):
            self.prometheus.set_targets(job, *(replica.url for replica in self._replicas))

    def causes(self) -> dict[str, AbstractContextManager[Any]]:
        """Return a block for each cause of CAUSED."""
        traffic, targets = self.traffic, self._targets
        return {
            "half of the requests invalid": traffic.changed(special="bad"),
            "half of the emails duplicate": traffic.changed(special="twice@example.com"),
            "four times the traffic": traffic.changed(rate=REQUESTS * 4),
            "database stopped": stopped(self._postgres, self._url),
            "table locked, many clients": self._pool_exhausted(),
            "table locked for 2 s at a time": Repeated(self._lock),
            "a worker killed repeatedly": Repeated(self._kill_newest_worker),
            "a replica restarted repeatedly": self._restarts(),
            "traffic stopped": traffic.changed(rate=0),
            "a replica stopped": self._down(1),
            "a replica gone": targets([self._first.url], "signup-server", "signup-ready"),
            "readiness not probed": targets([], "signup-ready"),
            "proxy stopped": self._no_proxy(),
            "proxy stopped again and again": Repeated(self._restart_proxy),
            "service stopped": self._down(0, 1),
            "cAdvisor stopped": targets([f"http://127.0.0.1:{free_port()}"], "cadvisor"),
            "prometheus.yml invalid": self._wrong_configuration(),
        }

    def _lock(self) -> None:
        with locked(self._postgres, self._url):
            time.sleep(2)

    @contextlib.contextmanager
    def _pool_exhausted(self) -> Iterator[None]:
        with self.traffic.changed(rate=REQUESTS * 10), locked(self._postgres, self._url):
            yield

    def _kill_newest_worker(self) -> None:
        """Kill it once all four have started; scrapes reach the others."""
        pids = self._replicas[0].worker_pids()
        if len(pids) == 4 and self._replicas[0].metric_files(pids[-1]):
            os.kill(pids[-1], signal.SIGKILL)
        time.sleep(0.05)

    @contextlib.contextmanager
    def _restarts(self) -> Iterator[None]:
        """Repeatedly start a replica on one port, and stop it once it has been scraped."""
        port = free_port()
        is_up = f'up{{instance="127.0.0.1:{port}"}} == 1'

        def once() -> None:
            with self._replica("1", port):
                wait_until(lambda: self.prometheus.query(is_up))

        with self._targets([f"http://127.0.0.1:{port}"], "signup-server"), Repeated(once):
            yield

    @contextlib.contextmanager
    def _down(self, *replicas: int) -> Iterator[None]:
        for replica in replicas:
            self._replicas[replica].stop()
        yield
        self._start()

    @contextlib.contextmanager
    def _targets(self, urls: list[str], *jobs: str) -> Iterator[None]:
        for job in jobs:
            self.prometheus.set_targets(job, *urls)
        yield
        for job in jobs:
            self.prometheus.set_targets(job)
        self._scrape()

    @contextlib.contextmanager
    def _no_proxy(self) -> Iterator[None]:
        self._proxy.stop()
        yield
        self._proxy.start()

    def _restart_proxy(self) -> None:
        with self._no_proxy():
            time.sleep(0.5)
        time.sleep(0.5)

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

        Returns how long after its start each reached Alertmanager, and after its end left it.
        """
        self._wait(alerts, False)
        begin = time.monotonic()
        with self.causes()[cause]:
            fired = self._wait(alerts, True, begin)
        return fired, self._wait(alerts, False, time.monotonic())

    def _wait(self, alerts: str, present: bool, since: float = 0) -> dict[str, float]:
        """Wait until each alert is present, or absent; return how long after `since` it was so."""
        times: dict[str, float] = {}

        def others() -> set[str]:
            now = self.alertmanager.alerts().keys()
            names = {*alerts.split()} - times.keys()
            return names & now if present else names - now

        while times.keys() != {*alerts.split()}:
            for alert in wait_until(others, timeout=90):
                times[alert] = time.monotonic() - since
        return times


def main() -> None:
    """Print a row for each alert."""
    print(f"{'alert':38}{'cause':38}{'fired after':>11}{'resolved after':>16}")
    with Deployment() as deployment:
        for cause, alerts in CAUSED.items():
            fired, resolved = deployment.run(cause, alerts)
            for alert, after in fired.items():
                print(f"{alert:38}{cause:38}{after:9.1f} s{resolved[alert]:14.1f} s", flush=True)


if __name__ == "__main__":
    main()
