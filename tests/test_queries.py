"""Each query of docs/queries.md on a real Prometheus, after known traffic to a real service."""

import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from time import time

import pytest

from .faults import read_only
from .monitoring import Prometheus, needs
from .service import ROOT, Postgres, Samples, Service, locked_table, wait_until

pytestmark = needs("prometheus", "promtool")

TEXT = (ROOT / "docs/queries.md").read_text()
QUERIES = dict(re.findall(r"^([^\n]+):\n\n```promql\n(.*?)```", TEXT, re.MULTILINE | re.DOTALL))
RUNBOOK = (ROOT / "docs/runbook.md").read_text()
IN_RUNBOOK = [
    *re.findall(r"```promql\n(.*?)```", RUNBOOK, re.DOTALL),
    *re.findall(r"`((?:sum|sort_desc|topk|histogram_quantile|job:|up|process_).*?)`", RUNBOOK),
]
WAITING = 5  # requests at the moment of the queries
# What is sent: of each, the error type or the field, and how often.
ERRORS = {
    "validation": 60,
    "duplicate_email": 25,
    "invalid_json": 15,
    "invalid_method": 10,
    "database": 20,
}
FIELDS = {"email": 30, "first_name": 20, "last_name": 10}
CODES = {"201": 200, "400": 75, "405": 10, "409": 25, "413": 0, "500": 20, "503": 0}
ALL = sum(CODES.values())
# An hour before: signups and duplicates a second, over 10 minutes.
PAST = {"201": 2, "409": 0.5}
HOUR_AGO = sum(PAST.values())
CONTAINERS = {"signup-server-1": 0.4, "signup-server-2": 0.2}  # CPU seconds a second
MEMORY, RECEIVED = 60, 5000  # MiB, bytes a second


def send(service: Service, postgres: Postgres, url: str) -> None:
    """Everything that ERRORS, FIELDS and CODES say."""

    def user(number: int, **fields: str) -> dict[str, str]:
        return {"email": f"{number}@example.com", "first_name": "A", "last_name": "B"} | fields

    for number in range(CODES["201"]):
        service.signup(json=user(number))
    for number in range(ERRORS["duplicate_email"]):
        service.signup(json=user(number))
    for field, count in FIELDS.items():
        for number in range(count):
            service.signup(json=user(number, **{field: ""}))
    for _ in range(ERRORS["invalid_json"]):
        service.signup(data="{")
    for _ in range(ERRORS["invalid_method"]):
        service.signup("GET")
    with read_only(postgres, url):
        for number in range(ERRORS["database"]):
            service.signup(json=user(-number))
    assert service.answers == {int(code): n for code, n in CODES.items() if n}


def past_samples(end: float) -> str:
    """What a Prometheus would have scraped an hour ago, of a replica and of cAdvisor."""
    lines = []

    def add(kind: str, name: str, labels: str, values: Iterator[float]) -> None:
        samples = (f"{name}{labels} {v} {end - 600 + 15 * n}" for n, v in enumerate(values))
        lines.extend([f"# TYPE {name.removesuffix('_total')} {kind}", *samples])

    def rising(rate: float) -> Iterator[float]:
        return (rate * 15 * n for n in range(41))

    for code, rate in PAST.items():
        labels = f'{{job="signup-server",instance="past",status_code="{code}"}}'
        add("counter", "signup_requests_total", labels, rising(rate))
    for name, cpu in CONTAINERS.items():
        labels = f'{{job="cadvisor",name="{name}"}}'
        add("counter", "container_cpu_usage_seconds_total", labels, rising(cpu))
        add("counter", "container_network_receive_bytes_total", labels, rising(RECEIVED))
        add("gauge", "container_memory_usage_bytes", labels, iter([MEMORY * 2**20] * 41))
    # OpenMetrics wants each family once, and its samples together.
    heads = dict.fromkeys(line for line in lines if line.startswith("#"))
    family = {head: head.split()[2] for head in heads}
    ordered = [
        line for head in heads for line in [head, *(x for x in lines if x.startswith(family[head]))]
    ]
    return "\n".join([*ordered, "# EOF\n"])


@pytest.fixture(scope="module")
def expected(
    service: Service, postgres: Postgres, database_url: str
) -> Iterator[tuple[Prometheus, float, dict[str, object]]]:
    """A Prometheus with everything in it, the time to ask for, and the answer to each query."""
    with (
        Prometheus(
            "250ms", lambda rules: rules.replace("interval: 5m", "interval: 1s")
        ) as prometheus,
        ThreadPoolExecutor(WAITING) as executor,
    ):
        prometheus.set_targets("signup-server", service.url)
        wait_until(lambda: prometheus.query("count_over_time(up[1m]) > 20"))
        send(service, postgres, database_url)
        recorded = "timestamp(job:signup_slow_requests_per_requests:ratio_rate30d)"
        sent = time()
        wait_until(lambda: prometheus.query(f"{recorded} > {sent + 1}"))
        with locked_table(postgres.admin_url(database_url)):
            for number in range(WAITING):
                json = {"email": f"w{number}@example.com", "first_name": "A", "last_name": "B"}
                executor.submit(service.signup, json=json)
            in_use = 'sum(database_connections{state="in_use"})'
            wait_until(lambda: prometheus.query(in_use) == {"": WAITING})
            now = time()
            samples = service.metrics()
        prometheus.load(past_samples(now - 3600))
        yield prometheus, now, answers(samples)


def answers(now: Samples) -> dict[str, object]:
    """By the text above a query: a value, or a value for each label, or a check."""
    rate = {name: count / 300 for name, count in ERRORS.items()}
    duration, query = "signup_request_duration_seconds", "database_query_duration_seconds"
    codes = [code for code, n in CODES.items() if n]
    today = CODES["201"] + PAST["201"] * 600
    in_use, idle, open_ = (
        now.get_value("database_connections", state=s) for s in ("in_use", "idle", "open")
    )
    assert (in_use, open_) == (WAITING, WAITING + idle)
    return {
        "Successful signups a second": CODES["201"] / 60,
        "Requests a second, whatever their outcome": ALL / 60,
        "Requests a minute": ALL,
        "Signups of the last hour": CODES["201"],
        "Signups of the last 24 hours": today,
        "Progress to 1,000 signups in 24 hours, in percent": today / 10,
        "Requests a second by status code": {code: n / 300 for code, n in CODES.items()},
        "Traffic as a multiple of that of an hour ago": ALL / 300 / HOUR_AGO,
        "Requests being worked on now": WAITING,
        "Median latency, in seconds": quantile(now, 0.5, duration),
        "p95 latency, in seconds": quantile(now, 0.95, duration),
        "p99 latency, the outliers, in seconds": quantile(now, 0.99, duration),
        "Average latency, in seconds": average(now, duration),
        "p95 latency of successful signups, in seconds": quantile(
            now, 0.95, duration, status_code="201"
        ),
        "p95 latency of failures of the server, to compare with it, in seconds": quantile(
            now, 0.95, duration, status_code="500"
        ),
        "p95 latency by status code, in seconds": {
            code: quantile(now, 0.95, duration, status_code=code) for code in codes
        },
        "Error rate, in percent of the requests": 100 * sum(ERRORS.values()) / ALL,
        "The three most frequent errors, a second": {
            name: rate[name] for name in ("validation", "duplicate_email", "database")
        },
        "Errors a second by type, the most frequent first": rate | {"internal": 0},
        "Errors of the last hour by type": ERRORS | {"internal": 0},
        "Validation errors a second": rate["validation"],
        "Validation errors, in percent of the requests": 100 * ERRORS["validation"] / ALL,
        "Database errors a second": rate["database"],
        "Attempts a second with a registered email, as bots make them": 5 * rate["duplicate_email"],
        "Errors of the client a second": (sum(ERRORS.values()) - ERRORS["database"]) / 300,
        "Errors of the server a second": ERRORS["database"] / 300,
        "Success rate, in percent of the requests": 100 * CODES["201"] / ALL,
        "Success rate as a multiple of that of an hour ago": (
            CODES["201"] / ALL / (PAST["201"] / HOUR_AGO)
        ),
        "Connection pool in use, in percent, of the replica that has the least left": WAITING * 4,
        "Connection pool in use, in percent of all replicas' connections": WAITING * 4,
        "Connections by state": {"in_use": WAITING, "idle": idle},
        "Open connections that are idle": idle,
        "Connections that could still be taken, opened already or not": 25 - WAITING,
        "How often the number of open connections changed in 5 minutes, the pool's churn": (
            lambda changes: changes >= 2  # opened, ended when the role changed, and opened again
        ),
        "p95 of the wait for a connection, in seconds": quantile(
            now, 0.95, "database_pool_wait_seconds"
        ),
        "Requests of the last hour that got no connection in time": 0,
        "CPU of all replicas' processes, in percent of one core": lambda cpu: 0 < cpu < 200,
        "Memory of all replicas' processes, in MiB": lambda memory: 50 < memory < 1000,
        "CPU by container, in percent of one core": {k: 100 * v for k, v in CONTAINERS.items()},
        "Memory by container, in MiB": dict.fromkeys(CONTAINERS, MEMORY),
        "Bytes received a second, by container": dict.fromkeys(CONTAINERS, RECEIVED),
        "p95 of the insert, in seconds": quantile(now, 0.95, query),
        "Average query, in seconds": average(now, query),
        "What the application adds to the p95 of the database, in seconds": (
            quantile(now, 0.95, duration, status_code="201") - quantile(now, 0.95, query)
        ),
        "The fields with the most errors in an hour, an hour's average a second": {
            field: count / 3600 for field, count in FIELDS.items()
        },
        "Errors of the email a second": FIELDS["email"] / 300,
        "Errors of the email, in percent of the requests": 100 * FIELDS["email"] / ALL,
        "Errors of the last 24 hours by field": FIELDS,
        "Availability budget left, in percent": {
            "signup-server": 100 * (1 - CODES["500"] / ALL / 0.001)
        },
        "Latency budget left, in percent": lambda percent: percent <= 100,
    }


def average(samples: Samples, name: str) -> float:
    return samples.total(f"{name}_sum") / samples.total(f"{name}_count")


def quantile(samples: Samples, q: float, name: str, **labels: str) -> float:
    """As Prometheus defines it: linear within the bucket that the rank falls into."""
    bounds = sorted({dict(k)["le"] for n, k in samples if n == f"{name}_bucket"}, key=float)
    totals = [samples.total(f"{name}_bucket", le=le, **labels) for le in bounds]
    rank = q * totals[-1]
    steps = pairwise(zip([0.0, *map(float, bounds)], [0.0, *totals], strict=True))
    (low, below), (high, above) = next(s for s in steps if s[1][1] >= rank)
    return low + (high - low) * (rank - below) / (above - below)


def test_every_query_has_an_answer(expected: tuple[Prometheus, float, dict[str, object]]) -> None:
    assert len(QUERIES) == TEXT.count("```promql")
    assert QUERIES.keys() == expected[2].keys()


@pytest.mark.parametrize("what", QUERIES)
def test_query(what: str, expected: tuple[Prometheus, float, dict[str, object]]) -> None:
    prometheus, now, answers = expected
    result = prometheus.query(QUERIES[what], now - 3600 if "container" in QUERIES[what] else now)
    assert result
    assert all(map(math.isfinite, result.values()))
    answer = answers[what]
    if callable(answer):
        (value,) = result.values()
        assert answer(value)
    else:
        wanted = answer if isinstance(answer, dict) else {"": answer}
        assert result == pytest.approx(wanted, rel=0.05, abs=1e-9)


@pytest.mark.parametrize("query", IN_RUNBOOK)
def test_query_of_the_runbook(
    query: str, expected: tuple[Prometheus, float, dict[str, object]]
) -> None:
    prometheus, now, _ = expected
    result = prometheus.query(query, now)
    assert result
    assert all(map(math.isfinite, result.values()))
