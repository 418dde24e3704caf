"""gunicorn's configuration for prometheus-flask-exporter."""

from prometheus_flask_exporter.multiprocess import GunicornInternalPrometheusMetrics

worker_class = "gthread"
workers = 2
threads = 8
keepalive = 75


def child_exit(server, worker):
    GunicornInternalPrometheusMetrics.mark_process_dead_on_child_exit(worker.pid)
