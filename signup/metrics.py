"""Metrics: the guide's golden signals, the hook pair that times /signup, and GET /metrics.

Every child (a metric with its label values) is bound once, here: so each value stands at 0 from
the first scrape, and no request pays for a look-up.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import perf_counter

import psutil
from flask import Flask, Response, g, request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from werkzeug.datastructures import MIMEAccept

from . import slots
from .process import ProcessCollector

STATUS_CODES = (201, 400, 405, 409, 413, 500, 503)
CLIENT_ERRORS = ("validation", "duplicate_email", "invalid_json", "invalid_method")
ERROR_TYPES = (*CLIENT_ERRORS, "database", "internal")
FIELDS = ("email", "first_name", "last_name")
STATES = ("in_use", "idle", "open")
# Seconds: the Go client's default, which the guide uses. Python's default is another one.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

STARTED = "signup.started"  # in the WSGI environment, which is at hand where flask.g is not


class Metrics:
    """The metrics of one worker, and the registry from which all workers' can be scraped."""

    def __init__(self, slot: slots.Slot | None, max_connections: int) -> None:
        self.registry = CollectorRegistry()
        if slot:  # the registry merges the files of all workers, this one's included
            slots.write_as(slot.number, slot.folder)
            MultiProcessCollector(self.registry, str(slot.folder))
            self.registry.register(ProcessCollector(slot.folder))
        own = None if slot else self.registry
        counter = partial(Counter, registry=own)
        histogram = partial(Histogram, buckets=BUCKETS, registry=own)
        gauge = partial(Gauge, multiprocess_mode="livesum", registry=own)

        text = "Duration of signup requests in seconds"
        durations = histogram("signup_request_duration_seconds", text, ["status_code"])
        self.durations = {code: durations.labels(code) for code in STATUS_CODES}
        requests = counter("signup_requests_total", "Answered signup requests", ["status_code"])
        self.requests = {code: requests.labels(code) for code in STATUS_CODES}
        errors = counter("signup_errors_total", "Failed signup requests, by cause", ["error_type"])
        self.errors = {name: errors.labels(name) for name in ERROR_TYPES}
        refused = counter("signup_validation_errors_total", "Fields that were refused", ["field"])
        self.validation_errors = {field: refused.labels(field) for field in FIELDS}
        text = "Signup requests with an email that is registered already"
        self.duplicate_emails = counter("signup_duplicate_email_attempts_total", text)
        self.in_flight = gauge("signup_requests_in_flight", "Signup requests being worked on")
        text = "Duration of database queries in seconds"
        queries = histogram("database_query_duration_seconds", text, ["operation"])
        self.insert_duration = queries.labels("insert_user")
        connections = gauge("database_connections", "Connections of the pools", ["state"])
        self.connections = {state: connections.labels(state) for state in STATES}
        maximum = gauge("database_connections_max", "Connections that live workers may open")
        maximum.set(max_connections)
        text = "Wait of requests for a database connection in seconds"
        self.pool_wait = histogram("database_pool_wait_seconds", text)
        text = "Requests that got no database connection in time"
        self.pool_timeouts = counter("database_pool_timeouts_total", text)


def of_master(folder: Path) -> Counter:
    """In the gunicorn master: when it started, and the counter of the workers that it starts."""
    slots.write_as(slots.MASTER, folder)
    text = "Start of the master in seconds since the Unix epoch"
    started = Gauge("process_start_time_seconds", text, multiprocess_mode="max", registry=None)
    started.set(psutil.Process().create_time())
    text = "Workers started since the service was; those that a reload starts count as well"
    return Counter("signup_worker_starts_total", text, registry=None)


def init_app(app: Flask, metrics: Metrics) -> None:
    """Time and count every request to /signup, and serve GET /metrics."""

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
        encode, content_type = _encoder(request.accept_mimetypes)
        return Response(encode(metrics.registry), content_type=content_type)


def _encoder(accept: MIMEAccept) -> tuple[Callable[[CollectorRegistry], bytes], str]:
    """The format that the scraper likes best: the library's chooser knows no qualities."""
    for value, quality in sorted(accept, key=lambda item: -item[1]):
        wanted = value.lower()
        with suppress(TypeError):  # of the chooser, for `version=x`
            encode, content_type = choose_encoder(wanted)
            if quality and wanted.partition(";")[0] in (content_type.partition(";")[0], "*/*"):
                return encode, content_type
    return choose_encoder("")
