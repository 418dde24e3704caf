"""gunicorn's settings, then the hooks of the master's and the workers' lives.

`gunicorn app:app` finds this file by itself. The master loads the service's code, so that all its
workers run the same: HUP replaces the workers, and new code needs USR2 or a restart.
"""

import atexit
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from psycopg2.extensions import parse_dsn

from signup import database, logs, slots
from signup.config import Config, ConfigError
from signup.worker import Worker, loads

try:
    settings = Config.from_env()
except ConfigError as error:
    sys.exit(str(error))

logs.configure(settings.log_level)

bind = f"0.0.0.0:{settings.port}"
# As measured (docs/performance.md): a worker for each core, and 2 at least, so that one can be
# replaced. More turns than a worker has connections: what waits then does so in the pool, where it
# goes in order and the metrics show it.
workers = settings.workers
threads = settings.threads
worker_class = Worker  # gunicorn's gevent worker, on which slow clients cost the others nothing
# Each worker must make its metrics and connections itself, after the fork.
preload_app = False
# One queue of connections for all workers: with a queue each, a worker that ends resets the
# connections that wait in its own.
reuse_port = False
# Longer than the proxy keeps its idle connections (nginx/nginx.conf: 60 s), so that the server
# never closes one just as the next request comes.
keepalive = 75
# Workers show here that they live; on a disk, a slow write would look like a hanging worker.
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
# Its default path is outside the project, and one for all instances of a user.
control_socket_disable = True
# No header may replace the path that is matched and counted, not even one from this machine.
forwarder_headers = ""
logger_class = logs.GunicornLogger
loglevel = settings.log_level
proc_name = "signup"

ENDINGS = {signal.SIGINT, signal.SIGQUIT, signal.SIGTERM}


def on_starting(server: Any) -> None:
    """Before the first worker: a metrics folder, a database with its schema."""
    for number in (signal.SIGINT, signal.SIGTERM):  # until gunicorn sets its own handlers
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    if not issubclass(server.cfg.worker_class, Worker):  # its greenlets count without a lock
        sys.exit("worker_class: the service runs on its own worker alone (signup/worker.py)")
    os.environ["WEB_CONCURRENCY"] = str(server.cfg.workers)  # --workers has the last word
    try:
        folder = slots.Folder(settings.metrics_dir)
        _at_exit(folder.remove)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder.path)
        if settings.database_url is None:
            os.environ["DATABASE_URL"] = _start_embedded()
        database.create_schema(Config.from_env())
    except (ConfigError, slots.FolderError, database.Unavailable) as error:
        sys.exit(str(error))


def when_ready(server: Any) -> None:
    """Say where the service is, and where the data lies."""
    if settings.database_url is None:
        data = f"an embedded PostgreSQL, data in {_embedded_home()}"
    else:
        target = parse_dsn(settings.database_url)
        data = f"database {target.get('dbname', '')!r} on {target.get('host', 'localhost')}"
    address = str(server.LISTENERS[0]).replace("0.0.0.0", "localhost")
    print(f"signup service on {address}, {data}", file=sys.stderr, flush=True)


def pre_fork(server: Any, worker: Any) -> None:
    """In the master: a slot for the new worker. Only reaped workers have left WORKERS."""
    worker.slot = slots.lowest_free(live.slot for live in server.WORKERS.values())


def post_fork(server: Any, worker: Any) -> None:
    """In the worker, before it loads the application."""
    # Until gunicorn sets the worker's handlers, the master's would swallow what ends a worker.
    for number in ENDINGS:
        signal.signal(number, _quit)
    if not ENDINGS.isdisjoint(_drain(server.SIG_QUEUE)):
        sys.exit(0)
    slots.use(worker.slot)


def post_worker_init(worker: Any) -> None:
    """In the worker, once it has loaded the application."""
    # What there is by now stays as long as the worker: the collector need not look at it again.
    gc.freeze()
    worker.retire = worker.wsgi.extensions["database"].pool.retire


def child_exit(server: Any, worker: Any) -> None:
    """In the master, once a worker is reaped, however it died."""
    loads[worker.slot] = 0
    slots.release(worker.slot, Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))


def _quit(number: int, _: object) -> None:
    if number == signal.SIGINT:  # as in Worker.handle_quit
        return
    for ending in ENDINGS:
        signal.signal(ending, lambda *_: None)  # SIG_IGN would print an error for a pending one
    sys.exit(0)


def _drain(queue: "SimpleQueue[int]") -> Iterator[int]:
    with contextlib.suppress(Empty):
        while True:
            yield queue.get_nowait()


def _start_embedded() -> str:
    from signup.embedded import EmbeddedError, EmbeddedPostgres  # only where it is used

    embedded = EmbeddedPostgres(_embedded_home())
    _at_exit(embedded.stop)
    try:
        return embedded.start()
    except EmbeddedError as error:
        sys.exit(str(error))


def _embedded_home() -> Path:
    from signup.embedded import home_for

    return home_for(Path(__file__).resolve().parent)


def _at_exit(clean_up: Callable[[], None]) -> None:
    # on_exit would miss an exit during the start, as when the port is taken. Workers inherit
    # what is registered here, and must leave it alone.
    master = os.getpid()
    atexit.register(lambda: clean_up() if os.getpid() == master else None)
