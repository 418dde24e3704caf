"""gunicorn's settings, then its hooks. From another folder, pass this file with --config."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from gunicorn.errors import HaltServer
from prometheus_client import Counter
from prometheus_client.multiprocess import mark_process_dead

chdir = str(Path(__file__).resolve().parent)
sys.path.insert(0, chdir)
from signup import database, logs, slots  # noqa: E402
from signup.config import Config  # noqa: E402

# Each worker imports the service from disk again, so that --reload and HUP run new code.
for name in [name for name in sys.modules if name.partition(".")[0] == "signup"]:
    del sys.modules[name]
settings = Config.from_env()

bind = f"0.0.0.0:{settings.port}"
# One worker per core, and at least 2, so that one serves while the other is replaced.
workers = max(2, len(os.sched_getaffinity(0)))
workers = settings.web_concurrency or min(workers, settings.database_max_connections)
worker_class = "gevent"  # one greenlet per connection; gthread and sync count exactly as well
keepalive = 10  # seconds; nginx's 5 is less, or a request could meet a connection that is closing
graceful_timeout = int(settings.database_pool_timeout + settings.database_statement_timeout) + 3
# For the workers' heartbeats. On a disk, a slow write would make a worker look hung.
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
control_socket_disable = True  # all instances of a user share its default path
forwarder_headers = ""  # no header may override the path that is routed and counted
logger_class = logs.GunicornLogger
loglevel = settings.log_level
# JSON without personal data. The access log is off unless `accesslog` is set.
access_log_format = (
    '{"time": "%(t)s", "method": "%({signup.method}e)s", "path": "%({signup.path}e)s", '
    '"status": %(s)s, "duration": %(L)s, "request_id": "%({signup.request_id}e)s"}'
)


def on_starting(server: Any) -> None:
    """In the master, before the first fork: check settings, create schema and metrics folder."""
    server.config = Config.from_env(os.environ | server.cfg.env, workers=server.cfg.workers)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback, until gunicorn handles it
    if os.geteuid() == 0 != server.cfg.uid:  # --user: try with the files that workers can read
        os.environ.pop("HOME", None)  # libpq then takes the home of the effective user
        os.seteuid(server.cfg.uid)
    database.prepare_table(server.config)
    os.seteuid(os.getuid())
    try:
        server.folder = slots.make_folder(server.config.prometheus_multiproc_dir or worker_tmp_dir)
    except OSError as error:
        sys.exit(f"PROMETHEUS_MULTIPROC_DIR: {error}")


def when_ready(server: Any) -> None:
    """Print the service's address and number of workers."""
    address = str(server.LISTENERS[0]).replace("0.0.0.0", "localhost")
    print(f"signup service on {address}, {server.num_workers} workers", file=sys.stderr, flush=True)


def pre_fork(server: Any, worker: Any) -> None:
    """In the master: assign a free slot. WORKERS contains a dead worker until it is reaped."""
    taken = {old.slot.number for old in server.WORKERS.values()}
    budget = server.config.database_max_connections
    worker.slot = slots.Slot.choose(taken, budget, server.cfg.workers, server.folder)
    try:
        if worker.slot.prepare(server.cfg.uid, server.cfg.gid):
            slots.write_as("master", server.folder)
            server.starts = Counter("signup_worker_starts_total", "Workers started", registry=None)
            if taken:  # the folder was deleted: replace workers that write to unlinked files
                os.kill(os.getpid(), signal.SIGHUP)
    except OSError as error:  # this worker and every replacement would fail
        raise HaltServer(f"PROMETHEUS_MULTIPROC_DIR: {error}", 1) from error
    server.starts.inc()


def post_fork(server: Any, worker: Any) -> None:
    """In the worker, before it loads the application."""
    # Until gunicorn installs the worker's handlers, the master's would swallow these signals.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ctrl-C reaches only the master, which stops its workers
    os.environ["SIGNUP_SLOT"] = json.dumps(worker.slot)  # read by create_app


def post_worker_init(worker: Any) -> None:
    """In the loaded worker: cache settings, which gunicorn computes some 30 times per request."""
    vars(worker.cfg).update({name: each.get() for name, each in worker.cfg.settings.items()})


def child_exit(server: Any, worker: Any) -> None:
    """In the master, once a worker is reaped, however it died: remove its live gauges."""
    mark_process_dead(worker.slot.number, server.folder)


def on_exit(server: Any) -> None:
    """In the exiting master: remove its metrics folder. After SIGKILL, the next start does."""
    shutil.rmtree(server.folder, ignore_errors=True)
