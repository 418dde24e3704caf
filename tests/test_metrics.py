"""The metrics contract: the content of a scrape, in both formats, from any worker."""

from collections.abc import Iterator

import pytest

from testbed.service import Service

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, "+Inf")
HISTOGRAMS = {
    "signup_request_duration_seconds",
    "database_query_duration_seconds",
    "database_pool_wait_seconds",
}
# Each metric, its label, and all values of the label.
CONTRACT = """\
signup_requests_total status_code 201 400 405 409 413 500 503
signup_request_duration_seconds status_code 201 400 405 409 413 500 503
signup_errors_total error_type \
validation duplicate_email database invalid_json invalid_method internal
signup_validation_errors_total field email first_name last_name
signup_duplicate_email_attempts_total
signup_requests_in_flight
signup_workers
signup_worker_starts_total
database_connections state in_use idle open
database_connections_max
database_query_duration_seconds operation insert_user
database_pool_waiting
database_pool_wait_seconds
database_pool_timeouts_total
process_cpu_seconds_total
process_resident_memory_bytes
process_open_fds
process_start_time_seconds
"""
# The Accept header of Prometheus 3, without and with native histograms.
PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)
PROTOBUF = (
    "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited"
    ";q=0.6"
)


def expected() -> Iterator[tuple[str, frozenset[tuple[str, str]]]]:
    """Yield the name and labels of every sample in the contract."""
    for line in CONTRACT.splitlines():
        name, label, *values = f"{line} ".split(" ")
        for labels in [{(label, value)} for value in values if value] or [set()]:
            if name in HISTOGRAMS:
                yield from ((f"{name}_{part}", frozenset(labels)) for part in ("sum", "count"))
                for bucket in BUCKETS:
                    yield f"{name}_bucket", frozenset({*labels, ("le", str(bucket))})
            else:
                yield name, frozenset(labels)


@pytest.mark.parametrize("openmetrics", [False, True])
def test_first_scrape_contains_every_series(service: Service, openmetrics: bool) -> None:
    samples = service.metrics(openmetrics)
    assert samples.keys() == set(expected())
    assert samples.get_value("database_connections_max") == 25
    assert samples.get_value("signup_worker_starts_total") == 4
    of_the_service = ("database_connections_max", "process_", "signup_worker")
    others = [v for (name, _), v in samples.items() if not name.startswith(of_the_service)]
    assert set(others) == {0}


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("text/plain;q=0.5, application/openmetrics-text;version=1.0.0", "openmetrics"),
        ("text/plain;Q=0.8, application/openmetrics-text;Q=0.9", "openmetrics"),
        ("APPLICATION/OPENMETRICS-TEXT", "openmetrics"),
        ("application/openmetrics-text;q=0, */*", "plain"),
        ("text/html, application/openmetrics-text;q=0.1", "openmetrics"),
        (PROMETHEUS_3, "openmetrics"),
        (f"{PROTOBUF},{PROMETHEUS_3}", "openmetrics"),
        ("application/openmetrics-text; version=x", "openmetrics"),
        (f"application/openmetrics-text; version={'9' * 5000}", "openmetrics"),
        ("application/openmetrics-text; q=x", "plain"),
        ("text/plain; version=y", "plain"),
        ("\xe9", "plain"),
        (";,", "plain"),
        ("", "plain"),
    ],
)
def test_accept_header_selects_the_format(service: Service, accept: str, kind: str) -> None:
    response = service.get("/metrics", headers={"Accept": accept.encode("latin-1")})
    assert response.status_code == 200
    expected = {"plain": "text/plain", "openmetrics": "application/openmetrics-text"}[kind]
    assert response.headers["Content-Type"].split(";")[0] == expected
    assert response.text.endswith("# EOF\n") == (kind == "openmetrics")
