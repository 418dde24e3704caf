"""A service with nothing of signup in it; its metrics are as prometheus_client's manual says."""

import os

import prometheus_client
from flask import Flask, Response
from prometheus_client import Counter, Gauge, Histogram, Summary, multiprocess

HITS = Counter("hits", "Requests")
REQUESTS = Counter("requests", "Requests by path", ["path"])
DURATIONS = Histogram("durations", "Made-up durations by path", ["path"])
SIZES = Summary("sizes", "Made-up sizes")
Gauge("build_info", "Always 1", ["version"], multiprocess_mode="max").labels("1.0").set(1)
for mode in ("all", "min", "max", "sum", "mostrecent"):
    for kind in (mode, f"live{mode}"):
        Gauge(f"in_{kind}", "1 by process", multiprocess_mode=kind).set(1)  # type: ignore[arg-type]

app = Flask(__name__)


@app.get("/<any(a, b):path>")
def count(path: str) -> str:
    HITS.inc()
    REQUESTS.labels(path).inc()
    DURATIONS.labels(path).observe(0.3)
    SIZES.observe(5)
    return str(os.getppid())  # the master, whose metrics have this request


@app.get("/folder")
def folder() -> str:
    return os.environ["PROMETHEUS_MULTIPROC_DIR"]


@app.get("/metrics")
def metrics() -> Response:
    registry = prometheus_client.CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    data = prometheus_client.generate_latest(registry)
    return Response(data, content_type=prometheus_client.CONTENT_TYPE_LATEST)
