"""Metrics: the guide's golden signals, the hook pair that times /signup, and GET /metrics.

README.md lists the metrics. Every child (a metric with its label values) is bound once, here:
so each value stands at 0 from the first scrape, and no request pays for a look-up.
"""

from time import perf_counter

from flask import Flask, Response, g, request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from . import slots
from .config import Config
from .process import ProcessCollector

STATUS_CODES = (201, 400, 405, 409, 413, 500, 503)
ERROR_TYPES = (
    "validation",
    "duplicate_email",
    "database",
    "invalid_json",
    "invalid_method",
    "internal",
)
FIELDS = ("email", "first_name", "last_name")
STATES = ("in_use", "idle", "open")
# Seconds: the Go client's default, which the guide uses. Python's default has other ones.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

STARTED = "signup.started"  # in the WSGI environment, as in signup/logs.py


class Metrics:
    """The metrics of one worker, and the registry from which all workers' can be scraped."""

    def __init__(self, config: Config) -> None:
        self.registry = CollectorRegistry()
        # In multiprocess mode the registry merges the files of all workers, this one's included.
        own = None if config.metrics_dir else self.registry

        durations = Histogram(
            "signup_request_duration_seconds",
            "Duration of signup requests in seconds",
            ["status_code"],
            buckets=BUCKETS,
            registry=own,
        )
        requests = Counter(
            "signup_requests_total",
            "Signup requests answered",
            ["status_code"],
            registry=own,
        )
        errors = Counter(
            "signup_errors_total",
            "Signup requests answered with an error, by cause",
            ["error_type"],
            registry=own,
        )
        validation_errors = Counter(
            "signup_validation_errors_total",
            "Signup requests refused for a field",
            ["field"],
            registry=own,
        )
        query_durations = Histogram(
            "database_query_duration_seconds",
            "Duration of database queries in seconds",
            ["operation"],
            buckets=BUCKETS,
            registry=own,
        )
        connections = Gauge(
            "database_connections",
            "Database connections of the pool by state; open is in_use plus idle",
            ["state"],
            multiprocess_mode="livesum",
            registry=own,
        )
        self.durations = {code: durations.labels(str(code)) for code in STATUS_CODES}
        self.requests = {code: requests.labels(str(code)) for code in STATUS_CODES}
        self.errors = {name: errors.labels(name) for name in ERROR_TYPES}
        self.validation_errors = {field: validation_errors.labels(field) for field in FIELDS}
        self.insert_duration = query_durations.labels("insert_user")
        self.connections = {state: connections.labels(state) for state in STATES}
        self.duplicate_emails = Counter(
            "signup_duplicate_email_attempts_total",
            "Signup requests with an email that is already registered",
            registry=own,
        )
        self.in_flight = Gauge(
            "signup_requests_in_flight",
            "Signup requests being worked on",
            multiprocess_mode="livesum",
            registry=own,
        )
        self.pool_wait = Histogram(
            "database_pool_wait_seconds",
            "Time that requests waited for a database connection in seconds",
            buckets=BUCKETS,
            registry=own,
        )
        self.pool_timeouts = Counter(
            "database_pool_timeouts_total",
            "Requests that got no database connection in time",
            registry=own,
        )
        worker_starts = Counter(
            "signup_worker_starts_total",
            "Workers started since the service was; those that a reload starts count as well",
            registry=own,
        )
        worker_starts.inc()
        self.registry.register(ServiceCollector(config))
        self.registry.register(ProcessCollector(slots.master()))
        if config.metrics_dir:
            self.registry.register(slots.SlotCollector(config.metrics_dir))


class ServiceCollector(Collector):
    """What holds for the whole service, and is not a sum over its workers."""

    def __init__(self, config: Config) -> None:
        self._max_connections = config.database_max_connections

    def collect(self) -> list[Metric]:
        return [
            GaugeMetricFamily(
                "database_connections_max",
                "Database connections that the whole service may open",
                self._max_connections,
            )
        ]


def init_app(app: Flask, config: Config) -> None:
    """Time and count every request to /signup, and serve GET /metrics."""
    metrics = app.extensions["metrics"] = Metrics(config)

    @app.before_request
    def start() -> None:
        environ = request.environ
        if environ["PATH_INFO"] == "/signup":
            environ[STARTED] = perf_counter()
            metrics.in_flight.inc()

    @app.after_request
    def finish(response: Response) -> Response:
        started = request.environ.get(STARTED)
        if started is not None:
            status = response.status_code
            metrics.durations[status].observe(perf_counter() - started)
            metrics.requests[status].inc()
            if status >= 400:
                metrics.errors[g.error_type].inc()
                if g.error_type == "validation":
                    metrics.validation_errors[g.field].inc()
                elif g.error_type == "duplicate_email":
                    metrics.duplicate_emails.inc()
            metrics.in_flight.dec()
        return response

    @app.get("/metrics")
    def expose() -> Response:
        if "application/openmetrics-text" in request.headers.get("Accept", ""):
            text = openmetrics.generate_latest(metrics.registry)
            return Response(text, content_type=openmetrics.CONTENT_TYPE_LATEST)
        return Response(generate_latest(metrics.registry), content_type=CONTENT_TYPE_PLAIN_0_0_4)
