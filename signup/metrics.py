"""Metrics: the golden signals, the hook pair that times /signup, and GET /metrics."""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
from flask import Flask, Response, g, request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from werkzeug.datastructures import MIMEAccept

from . import slots

STATUS_CODES = (201, 400, 405, 409, 413, 500, 503)
ERRORS = ("validation", "duplicate_email", "invalid_json", "invalid_method", "database", "internal")
FIELDS, STATES = ("email", "first_name", "last_name"), ("in_use", "idle", "open")
# Seconds. These are the default buckets of the Go client; those of the Python client differ.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """One worker's metrics, and the registry that exposes those of all workers."""

    def __init__(self, slot: slots.Slot | None, max_connections: int) -> None:
        self.slot, self.registry = slot, CollectorRegistry()
        if slot:  # the registry merges the files of all workers, including this one's
            slots.write_as(slot.number, slot.folder)
            MultiProcessCollector(self.registry, slot.folder)
            self.registry.register(ProcessCollector())
        own = None if slot else self.registry
        counter = partial(Counter, registry=own)
        histogram = partial(Histogram, buckets=BUCKETS, registry=own)
        gauge = partial(Gauge, multiprocess_mode="livesum", registry=own)
        durations = histogram("signup_request_duration_seconds", "Request time", ["status_code"])
        requests = counter("signup_requests_total", "Signup requests answered", ["status_code"])
        errors = counter("signup_errors_total", "Failed signup requests, by cause", ["error_type"])
        refused = counter("signup_validation_errors_total", "Invalid fields, by name", ["field"])
        connections = gauge("database_connections", "Pool connections", ["state"])
        # Every label value, so that its series is 0 from the first scrape.
        self.durations = {code: durations.labels(code) for code in STATUS_CODES}
        self.requests = {code: requests.labels(code) for code in STATUS_CODES}
        self.errors = {kind: errors.labels(kind) for kind in ERRORS}
        self.validation_errors = {field: refused.labels(field) for field in FIELDS}
        self.connections = {state: connections.labels(state) for state in STATES}
        self.duplicate_emails = counter("signup_duplicate_email_attempts_total", "Duplicate emails")
        self.in_flight = gauge("signup_requests_in_flight", "Signup requests in flight")
        gauge("signup_workers", "Live workers").set(1)
        queries = histogram("database_query_duration_seconds", "Query time", ["operation"])
        self.insert_duration = queries.labels("insert_user")
        gauge("database_connections_max", "Connection limit of live workers").set(max_connections)
        self.pool_waiting = gauge("database_pool_waiting", "Signups waiting for a connection")
        self.pool_wait = histogram("database_pool_wait_seconds", "Wait for a connection")
        self.pool_timeouts = counter("database_pool_timeouts_total", "Waits that timed out")


class ProcessCollector(Collector):
    """CPU, memory and files of master and workers, which the multiprocess mode doesn't expose."""

    def collect(self) -> Iterable[Metric]:
        master = psutil.Process(os.getppid())
        while True:
            # Reaping a worker adds its CPU time to the master's. If that happens during the read,
            # the time is counted twice or not at all, and the total jumps. So read again.
            own = master.cpu_times()[:4]  # user and system, of itself and of reaped children
            pids = Path(f"/proc/{master.pid}/task/{master.pid}/children").read_text().split()
            with suppress(psutil.NoSuchProcess):
                children = [psutil.Process(int(pid)) for pid in pids]
                cpu = sum(own) + sum(sum(child.cpu_times()[:2]) for child in children)
                reaping = any(child.status() == psutil.STATUS_DEAD for child in children)
                if not reaping and master.cpu_times()[2:4] == own[2:]:
                    break
            time.sleep(0.0005)
        memory = descriptors = 0
        for process in (master, *children):
            with suppress(psutil.Error):  # it has exited, or belongs to another user (--user)
                memory += process.memory_info().rss
                descriptors += process.num_fds()
        yield CounterMetricFamily("process_cpu_seconds", "CPU time, exited workers included", cpu)
        yield GaugeMetricFamily("process_resident_memory_bytes", "RSS, master and workers", memory)
        yield GaugeMetricFamily("process_open_fds", "Open files, master and workers", descriptors)
        yield GaugeMetricFamily("process_start_time_seconds", "Master start", master.create_time())


def init_app(app: Flask, metrics: Metrics) -> None:
    """Time and count every request to /signup, and serve GET /metrics."""

    @app.before_request
    def start() -> None:
        if request.environ["PATH_INFO"] == "/signup":
            request.environ["signup.started"] = time.perf_counter()
            metrics.in_flight.inc()

    @app.after_request
    def finish(response: Response) -> Response:
        if started := request.environ.get("signup.started"):
            status = response.status_code
            metrics.durations[status].observe(time.perf_counter() - started)
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
        if slot := metrics.slot:  # fail the scrape if this worker's files were deleted
            Path(slot.folder, slots.FILES[0].format(slot.number)).stat()
        # The library's chooser ignores quality values, and werkzeug's takes versions for types.
        kinds = MIMEAccept((kind.partition(";")[0], q) for kind, q in request.accept_mimetypes)
        best = kinds.best_match(["text/plain", "application/openmetrics-text"], default="")
        encode, content_type = choose_encoder(best)
        return Response(encode(metrics.registry), content_type=content_type)
