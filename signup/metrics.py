"""Metrics: each endpoint's golden signals, the hooks that record them, and GET /metrics."""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
from flask import Response, abort, g, request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from werkzeug.datastructures import MIMEAccept

STATUS_CODES = (201, 400, 405, 409, 413, 500, 503)
ERRORS = ("validation", "duplicate_email", "invalid_json", "invalid_method", "database", "internal")
# Seconds. These are the default buckets of the Go client; those of the Python client differ.
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
histogram = partial(Histogram, registry=None, buckets=BUCKETS)
gauge = partial(Gauge, registry=None, multiprocess_mode="livesum")


class Signals:
    """The golden signals of one endpoint; `name` is the start of their names."""

    def __init__(self, name: str, fields: tuple[str, ...]) -> None:
        counter = partial(Counter, namespace=name, registry=None)
        durations = histogram(f"{name}_request_duration_seconds", "Time", ["status_code"])
        requests = counter("requests_total", "Requests answered", ["status_code"])
        errors = counter("errors_total", "Failed requests, by cause", ["error_type"])
        refused = counter("validation_errors_total", "Invalid fields, by name", ["field"])
        # Every label value, so that its series is 0 from the first scrape.
        self.durations = {code: durations.labels(code) for code in STATUS_CODES}
        self.requests = {code: requests.labels(code) for code in STATUS_CODES}
        self.errors = {kind: errors.labels(kind) for kind in ERRORS}
        self.validation_errors = {field: refused.labels(field) for field in fields}
        self.duplicate_emails = counter("duplicate_email_attempts_total", "Duplicate emails")
        self.in_flight = gauge(f"{name}_requests_in_flight", "Requests in flight")


class Metrics:
    """One worker's metrics. The library writes them to files, which `expose` merges."""

    def __init__(self, max_connections: int) -> None:
        self.endpoints = {"/signup": Signals("signup", ("email", "first_name", "last_name"))}
        gauge("signup_workers", "Live workers").set(1)
        queries = histogram("database_query_duration_seconds", "Query time", ["operation"])
        self.queries = {name: queries.labels(name) for name in ("insert_user",)}
        connections = gauge("database_connections", "Pool connections", ["state"])
        self.connections = {n: connections.labels(n) for n in ("in_use", "idle", "open")}
        gauge("database_connections_max", "Connection limit of live workers").set(max_connections)
        self.pool_waiting = gauge("database_pool_waiting", "Requests waiting for a connection")
        self.pool_wait = histogram("database_pool_wait_seconds", "Wait for a connection")
        self.pool_timeouts = Counter("database_pool_timeouts_total", "Timed out", registry=None)

    def start(self) -> None:
        """Before a request: note the time, if it is measured. A 404 for "//signup"."""
        if (path := request.environ["PATH_INFO"]) != request.path:  # werkzeug merged slashes
            abort(404)
        if signals := self.endpoints.get(path):
            request.environ["signup.started"] = signals, time.perf_counter()
            signals.in_flight.inc()

    def finish(self, response: Response) -> Response:
        """After it: time and count it, and the cause of a failure, which views.py left in `g`."""
        if started := request.environ.get("signup.started"):
            signals, start = started
            status = response.status_code
            signals.durations[status].observe(time.perf_counter() - start)
            signals.requests[status].inc()
            if status >= 400:
                signals.errors[g.error_type].inc()
                if g.error_type == "validation":
                    signals.validation_errors[g.field].inc()
                elif g.error_type == "duplicate_email":
                    signals.duplicate_emails.inc()
            signals.in_flight.dec()
        return response

    def expose(self) -> Response:
        """GET /metrics, of all workers. Raises OSError if their folder was deleted."""
        Path(os.environ["PROMETHEUS_MULTIPROC_DIR"], "lock").stat()
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        registry.register(ProcessCollector())
        # The library's chooser ignores quality values, and werkzeug's takes versions for types.
        kinds = MIMEAccept((kind.partition(";")[0], q) for kind, q in request.accept_mimetypes)
        best = kinds.best_match(["text/plain", "application/openmetrics-text"], default="")
        encode, content_type = choose_encoder(best)
        return Response(encode(registry), content_type=content_type)


class ProcessCollector(Collector):
    """CPU, memory and files of master and workers, which the multiprocess mode doesn't expose."""

    def collect(self) -> Iterable[Metric]:
        with suppress(psutil.Error, OSError):  # hidden, as by hidepid or systemd's ProcSubset
            master, reaping = psutil.Process(os.getppid()), True
            while reaping:
                # Reaping a worker adds its time to the master's. Meanwhile, the total would jump.
                own = master.cpu_times()[:4]  # user and system, of itself and of reaped children
                pids = Path(f"/proc/{master.pid}/task/{master.pid}/children").read_text().split()
                with suppress(psutil.NoSuchProcess):
                    children = [psutil.Process(int(pid)) for pid in pids]
                    cpu = sum(own) + sum(sum(child.cpu_times()[:2]) for child in children)
                    dead = any(child.status() == psutil.STATUS_DEAD for child in children)
                    reaping = dead or master.cpu_times()[2:4] != own[2:]
            yield CounterMetricFamily("process_cpu_seconds", "CPU time, exited workers too", cpu)
            memory = descriptors = 0
            for process in (master, *children):
                with suppress(psutil.Error):  # it has exited, or belongs to another user (--user)
                    memory += process.memory_info().rss
                    descriptors += process.num_fds()
            yield GaugeMetricFamily("process_resident_memory_bytes", "Master and workers", memory)
            yield GaugeMetricFamily("process_open_fds", "Master and workers", descriptors)
            yield GaugeMetricFamily("process_start_time_seconds", "Start", master.create_time())
