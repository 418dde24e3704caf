"""gunicorn's settings, then its hooks. From another folder, name this file with --config."""

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from gunicorn.errors import HaltServer
from prometheus_client.multiprocess import mark_process_dead

chdir = str(Path(__file__).resolve().parent)
sys.path.insert(0, chdir)
from signup import database, logs, metrics, slots  # noqa: E402
from signup.config import Config  # noqa: E402

# A worker imports the service as it is on disk by then: --reload and HUP run new code.
for name in [name for name in sys.modules if name.partition(".")[0] == "signup"]:
    del sys.modules[name]
settings = Config.from_env()

bind = f"0.0.0.0:{settings.port}"
# A worker for each core, and at least 2, so that one can be replaced.
workers = max(2, len(os.sched_getaffinity(0)))
workers = settings.web_concurrency or min(workers, settings.database_max_connections)
worker_class = "gevent"  # a greenlet for each connection; gthread and sync are exact as well
# Seconds; longer than nginx's 5, or a connection could be closed just as the next request comes.
keepalive = 10
# No request takes longer.
graceful_timeout = int(settings.database_pool_timeout + settings.database_statement_timeout) + 3
# Workers show here that they live; on a disk, a slow write would look like a hanging worker.
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
control_socket_disable = True  # its default path is one for all instances of a user
forwarder_headers = ""  # no header may replace the path that is matched and counted
logger_class = logs.GunicornLogger
loglevel = settings.log_level
# JSON, and nothing personal; it is off unless accesslog is set.
access_log_format = (
    '{"time": "%(t)s", "method": "%({signup.method}e)s", "path": "%({signup.path}e)s", '
    '"status": %(s)s, "duration": %(L)s, "request_id": "%({signup.request_id}e)s"}'
)


def on_starting(server: Any) -> None:
    """Before the first worker: settings that fit, a database with its schema, and a folder."""
    server.config = Config.from_env(os.environ | server.cfg.env, workers=server.cfg.workers)
    for number in (signal.SIGINT, signal.SIGTERM):  # until gunicorn sets its own handlers
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    database.create_schema(server.config)
    try:
        server.folder = slots.make_folder(server.config.prometheus_multiproc_dir or worker_tmp_dir)
    except OSError as error:
        sys.exit(f"PROMETHEUS_MULTIPROC_DIR: {error}")


def when_ready(server: Any) -> None:
    """Say where the service is."""
    address = str(server.LISTENERS[0]).replace("0.0.0.0", "localhost")
    print(f"signup service on {address}, {server.num_workers} workers", file=sys.stderr, flush=True)


def pre_fork(server: Any, worker: Any) -> None:
    """In the master: a slot for the new worker. Only reaped workers have left WORKERS."""
    taken = {old.slot.number for old in server.WORKERS.values()}
    budget = server.config.database_max_connections
    worker.slot = slots.Slot.choose(taken, budget, server.cfg.workers, server.folder)
    try:
        if worker.slot.prepare(server.cfg.uid, server.cfg.gid):
            server.starts = metrics.of_master(server.folder)
            if taken:  # somebody removed the folder, and they count into files that nobody finds
                os.kill(os.getpid(), signal.SIGHUP)
    except OSError as error:  # the worker would die of it, and so would the next one
        raise HaltServer(f"PROMETHEUS_MULTIPROC_DIR: {error}", 1) from error
    server.starts.inc()


def post_fork(server: Any, worker: Any) -> None:
    """In the worker, before it loads the application."""
    # Until gunicorn sets the worker's handlers, the master's would swallow what ends a worker.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ctrl-C reaches the master alone, which ends its workers
    os.environ["SIGNUP_SLOT"] = json.dumps(worker.slot)  # for create_app


def post_worker_init(worker: Any) -> None:
    """In a worker that is loaded: gunicorn computes a setting at each of thirty looks a request."""
    vars(worker.cfg).update({name: each.get() for name, each in worker.cfg.settings.items()})


def worker_exit(server: Any, worker: Any) -> None:
    """In a worker that has ended: gunicorn's handler would print a traceback from here on."""
    signal.signal(signal.SIGQUIT, signal.SIG_IGN)


def child_exit(server: Any, worker: Any) -> None:
    """In the master, once a worker is reaped, however it died."""
    mark_process_dead(worker.slot.number, server.folder)  # drops its live gauges


def on_exit(server: Any) -> None:
    """In the master, at its end. The next one drops the folder of one that was killed."""
    shutil.rmtree(server.folder, ignore_errors=True)
