"""Each query of docs/queries.md on a real Prometheus, after known traffic to a real service."""

import math
import re
from functools import cache

import pytest

from testbed import ROOT
from testbed import watched as sent
from testbed.service import Samples
from testbed.watched import CONTAINERS, ERRORS, MISUSE, PROXY, SIGNUPS, Watched, quantile

pytestmark = pytest.mark.needs("prometheus", "promtool")

TEXT = (ROOT / "docs/queries.md").read_text()
QUERIES = dict(re.findall(r"^([^\n]+):\n\n```promql\n(.*?)```", TEXT, re.MULTILINE | re.DOTALL))
RUNBOOK = (ROOT / "docs/runbook.md").read_text()
IN_RUNBOOK = [
    *re.findall(r"```promql\n(.*?)```", RUNBOOK, re.DOTALL),
    *re.findall(r"`((?:sum|sort_desc|topk|histogram|job:|up|process_)[^`]*[{(].*?)`", RUNBOOK),
]
OTHERS = "container_|nginx|prometheus_|signup-probe"  # they have no data now, or only an hour ago


def average(samples: Samples, name: str) -> float:
    """Return the mean of a histogram."""
    return samples.total(f"{name}_sum") / samples.total(f"{name}_count")


@cache
def answers(watched: Watched) -> dict[str, object]:
    """Map the text above each query to a value, a value per label, or a check."""
    now = watched.samples
    rate = {name: count / 300 for name, count in ERRORS.items()}
    duration, query = "signup_request_duration_seconds", "database_query_duration_seconds"
    signups = Samples(item for item in now.items() if ("status_code", "405") not in item[0][1])

    def latency(q: float, codes: str = "|".join(sent.CODES.keys() - {"405"})) -> float:
        return quantile(now, q, duration, status_code=codes)

    errors = sum(ERRORS.values()) - ERRORS["invalid_method"]
    (replica,) = watched.prometheus.query("count by (instance) (up)", watched.now)
    idle = now.get_value("database_connections", state="idle")
    return {
        "Successful signups per second": sent.CODES["201"] / 60,
        "Requests per second, all outcomes": sent.ALL / 60,
        "Requests per minute": sent.ALL,
        "Signups of the last hour": sent.CODES["201"],
        "Signups of the last 24 hours": sent.TODAY,
        "Progress toward 1,000 signups in 24 hours, in percent": sent.TODAY / 10,
        "Requests per second by status code": {code: n / 300 for code, n in sent.CODES.items()},
        "Traffic as a multiple of that an hour ago": sent.ALL / 300 / sent.HOUR_AGO,
        "Requests in flight": sent.WAITING,
        "Median latency, in seconds": latency(0.5),
        "p95 latency, in seconds": latency(0.95),
        "p99 latency, in seconds": latency(0.99),
        "Average latency, in seconds": average(signups, duration),
        "p95 latency of successful signups, in seconds": latency(0.95, "201"),
        "p95 latency of server errors, in seconds": latency(0.95, "500"),
        "p95 latency by status code, in seconds": {
            code: latency(0.95, code) for code, n in sent.CODES.items() if n
        },
        "p95 latency by replica, in seconds": {replica: latency(0.95)},
        "Error rate, in percent of requests": 100 * (errors + MISUSE) / (SIGNUPS + MISUSE),
        "Error rate by replica, in percent": {replica: 100 * errors / SIGNUPS},
        "Server errors per second by replica": {replica: ERRORS["database"] / 300},
        "The three most frequent errors without 405s, per second": {
            name: rate[name] for name in ("validation", "duplicate_email", "database")
        },
        "Errors per second by type, the most frequent first": rate | {"internal": 0},
        "Errors of the last hour by type": ERRORS | {"internal": 0},
        "Validation errors per second": rate["validation"],
        "Validation errors, in percent of requests": 100 * ERRORS["validation"] / SIGNUPS,
        "Database errors per second": rate["database"],
        "Attempts per second with a registered email, a sign of bots": 5 * rate["duplicate_email"],
        "Client errors per second": (sum(ERRORS.values()) - ERRORS["database"]) / 300,
        "Server errors per second": ERRORS["database"] / 300,
        "Success rate, in percent of requests": 100 * sent.CODES["201"] / (SIGNUPS + MISUSE),
        "Success rate as a multiple of that an hour ago": (
            sent.CODES["201"] / SIGNUPS / (sent.PAST["201"] / sent.HOUR_AGO)
        ),
        "Connection pool usage of the busiest replica, in percent": sent.WAITING * 4,
        "Connection pool usage of all replicas, in percent": sent.WAITING * 4,
        "Connections by state": {"in_use": sent.WAITING, "idle": idle},
        "Idle connections": idle,
        "Available connections, open or not yet opened": 25 - sent.WAITING,
        # Opened, closed when the role changed, reopened.
        "Pool churn, changes of the open connections in 5 minutes": lambda count: count >= 2,
        "p95 wait for a connection, in seconds": quantile(now, 0.95, "database_pool_wait_seconds"),
        "Pool timeouts of the last hour": 0,
        "CPU of all replicas, in percent of one core": lambda cpu: 0 < cpu < 200,
        "Memory of all replicas, in MiB": lambda memory: 50 < memory < 1000,
        "CPU by container, in percent of one core": dict.fromkeys(CONTAINERS, 100 * sent.CPU),
        "Memory by container, in MiB": dict.fromkeys(CONTAINERS, sent.MEMORY),
        "Bytes received per second, by container": dict.fromkeys(CONTAINERS, sent.RECEIVED),
        "p95 of the INSERT, in seconds": quantile(now, 0.95, query),
        "Average query time, in seconds": average(now, query),
        "p95 of requests minus p95 of queries, the application's share, in seconds": (
            latency(0.95, "201|409") - quantile(now, 0.95, query)
        ),
        "The fields with the most errors, per second over the last hour": {
            field: count / 3600 for field, count in sent.FIELDS.items()
        },
        "Invalid emails per second": sent.FIELDS["email"] / 300,
        "Invalid emails, in percent of requests": 100 * sent.FIELDS["email"] / SIGNUPS,
        "Validation errors of the last 24 hours by field": sent.FIELDS,
        "Connections of nginx, in percent of its limit": 100 * PROXY["connections_active:ratio"],
        "Connections per second that nginx closed": PROXY["connections_dropped:rate5m"],
        "Requests per second at nginx": PROXY["http_requests:rate5m"],
        "Requests that nginx kept, in percent": 100 * PROXY["requests_not_signups:ratio_rate5m"],
        "Availability budget left, in percent": {
            "signup-server": 100 * (1 - sent.CODES["500"] / SIGNUPS / 0.001)
        },
        "Latency budget left, in percent": lambda percent: percent <= 100,
    }


@pytest.mark.parametrize("query", [*QUERIES.values(), *IN_RUNBOOK])
def test_every_series_selects_a_job(query: str) -> None:
    own = r"\b(?:signup|database|process|container|nginx)_\w+|\bup\b|\w+:\w+:\w+"
    job = r'\{job=~?"(?:signup-|cadvisor"|nginx")'
    assert len(re.findall(own, query)) == len(re.findall(job, query))


def test_every_query_has_an_expected_result(watched: Watched) -> None:
    assert len(QUERIES) == TEXT.count("```promql")
    assert QUERIES.keys() == answers(watched).keys()


@pytest.mark.parametrize("what", QUERIES)
def test_query_returns_the_expected_result(what: str, watched: Watched) -> None:
    query, answer = QUERIES[what], answers(watched)[what]
    time = watched.now - (3600 if re.search(OTHERS, query) else 0)
    result = watched.prometheus.query(query, time)
    assert result
    assert all(map(math.isfinite, result.values()))
    if callable(answer):
        (value,) = result.values()
        assert answer(value)
    else:
        wanted = answer if isinstance(answer, dict) else {"": answer}
        assert result == pytest.approx(wanted, rel=0.05, abs=1e-9)


@pytest.mark.parametrize("query", [*QUERIES.values(), *IN_RUNBOOK])
def test_query_returns_finite_values(query: str, watched: Watched) -> None:
    """Without traffic, those of the runbook with traffic too."""
    idle = watched.prometheus.query(query, watched.idle)
    busy = watched.prometheus.query(query, watched.now)
    assert busy or re.search(OTHERS, query)
    assert all(map(math.isfinite, (*idle.values(), *busy.values())))
