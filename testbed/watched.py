"""A real Prometheus that has scraped a real service under known traffic."""

import contextlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise, product
from time import time

from . import wait_until
from .database import Postgres, locked_table
from .faults import read_only
from .monitoring import STAGING, Prometheus
from .service import Samples, Service, user

# The traffic: requests by error type, by invalid field and by status code.
ERRORS = {
    "validation": 60,
    "duplicate_email": 25,
    "invalid_json": 15,
    "invalid_method": 60,
    "database": 20,
}
FIELDS = {"email": 30, "first_name": 20, "last_name": 10}
CODES = {"201": 200, "400": 75, "405": 60, "409": 25, "413": 0, "500": 20, "503": 0}
ALL = sum(CODES.values())
SIGNUPS = ALL - CODES["405"]  # the requests in ratios and quantiles
MISUSE = CODES["405"] - 0.15 * 300  # 405s of 5 minutes beyond those that a prober may cause
WAITING = 5  # requests in flight at the end
# Backfilled for ten minutes, an hour ago: a replica's requests per second, proxy and containers.
PAST = {"201": 2, "409": 0.5}
HOUR_AGO = sum(PAST.values())
TODAY = CODES["201"] + PAST["201"] * 600
CONTAINERS = ("signup-server-1", "signup-server-2")
PROXY = {"connections_active:ratio": 0.25, "connections_dropped:rate5m": 3}
PROXY |= {"http_requests:rate5m": 7, "requests_not_signups:ratio_rate5m": 0.5}
CPU, MEMORY, RECEIVED = 0.4, 60, 5000  # seconds per second, MiB, bytes per second


@dataclass(frozen=True, eq=False)
class Watched:
    """The times before (`idle`) and after (`now`) the traffic, and a scrape at `now`.

    Times are in seconds since 1970. The containers exist only an hour before `now`.
    """

    prometheus: Prometheus
    idle: float
    now: float
    samples: Samples


@contextlib.contextmanager
def watch(postgres: Postgres) -> Iterator[Watched]:
    """Start a service and a Prometheus, send the traffic, and backfill that of an hour ago."""
    url = postgres.new_database()
    with (
        Prometheus("250ms", _without_delays) as prometheus,
        Service(DATABASE_URL=url, WEB_CONCURRENCY="4", METRICS_SAMPLE_INTERVAL="0.05") as service,
        ThreadPoolExecutor(WAITING) as executor,
    ):
        service.wait_for(signup_worker_starts_total=4)
        prometheus.set_targets("signup-server", service.url)
        prometheus.set_targets(STAGING, service.url)  # no query may include this job
        wait_until(lambda: len(prometheus.query("count_over_time(up[1m]) > 20 and up == 1")) == 2)
        idle = time()
        _send(service, postgres, url)
        sent = time()
        recorded = "timestamp(job:signup_slow_requests_per_requests:ratio_rate30d)"
        wait_until(lambda: prometheus.query(f"{recorded} > {sent + 1}"))
        with locked_table(postgres.admin_url(url)):
            for number in range(WAITING):
                executor.submit(service.signup, json=user(f"waiting-{number}"))
            in_use = 'sum(database_connections{job="signup-server", state="in_use"})'
            wait_until(lambda: prometheus.query(in_use) == {"": WAITING})
            now, samples = time(), service.metrics()
        assert now - idle < 55, "too slow for queries with a window of a minute"
        prometheus.backfill(_past_samples(now - 3600))
        yield Watched(prometheus, idle, now, samples)


def _without_delays(rules: str) -> str:
    """Return the rules with every `for` and `interval` set to a second."""
    return re.sub(r"\b(for|interval): \w+", r"\1: 1s", rules)


def _send(service: Service, postgres: Postgres, url: str) -> None:
    for number in range(CODES["201"]):
        service.signup(json=user(f"{number}"))
    for number in range(ERRORS["duplicate_email"]):
        service.signup(json=user(f"{number}"))
    for field, count in FIELDS.items():
        for _ in range(count):
            service.signup(json=user("bad") | {field: ""})
    for _ in range(ERRORS["invalid_json"]):
        service.signup(data="{")
    for _ in range(ERRORS["invalid_method"]):
        service.signup("GET")
    with read_only(postgres, url):
        for number in range(ERRORS["database"]):
            service.signup(json=user(f"failed-{number}"))
    assert service.answers == {int(code): count for code, count in CODES.items() if count}


def _past_samples(end: float) -> str:
    """Return the samples of PAST and the containers until `end`, in OpenMetrics format."""
    families = {
        "counter signup_requests": {
            f'_total{{job="{job}",instance="past",status_code="{code}"}}': rate
            for job in ("signup-server", STAGING)
            for code, rate in PAST.items()
        },
        "counter container_cpu_usage_seconds": _of_containers("_total", CPU),
        "counter container_network_receive_bytes": _of_containers("_total", RECEIVED),
        "counter container_network_transmit_bytes": _of_containers("_total", RECEIVED),
        "gauge container_memory_usage_bytes": _of_containers("", MEMORY * 2**20),
    } | {
        f"gauge job:nginx_{name}": {'{job="signup-server"}': value} for name, value in PROXY.items()
    }
    lines = []
    for family, series in families.items():
        kind, name = family.split()
        lines.append(f"# TYPE {name} {kind}")
        for labels, value in series.items():
            for second in range(0, 601, 15):
                now = value * second if kind == "counter" else value
                lines.append(f"{name}{labels} {now} {end - 600 + second}")
    return "\n".join([*lines, "# EOF\n"])


def _of_containers(suffix: str, value: float) -> dict[str, float]:
    return {f'{suffix}{{job="cadvisor",name="{name}"}}': value for name in CONTAINERS}


def quantile(samples: Samples, q: float, name: str, **labels: str) -> float:
    """Return a quantile as Prometheus computes it: linear within the bucket of its rank.

    A label value may list alternatives, as in `201|409`.
    """
    bounds = sorted({dict(k)["le"] for n, k in samples if n == f"{name}_bucket"}, key=float)
    wanted = [
        dict(zip(labels, values, strict=True))
        for values in product(*(value.split("|") for value in labels.values()))
    ]
    totals = [sum(samples.total(f"{name}_bucket", le=le, **one) for one in wanted) for le in bounds]
    rank = q * totals[-1]
    steps = pairwise(zip([0.0, *map(float, bounds)], [0.0, *totals], strict=True))
    (low, below), (high, above) = next(s for s in steps if s[1][1] >= rank)
    return low + (high - low) * (rank - below) / (above - below)
