"""gunicorn's settings, then the hooks of the master's and the workers' lives.

gunicorn finds this file by itself in its folder; from elsewhere, name it with --config.
"""

import atexit
import os
import resource
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from gunicorn.errors import HaltServer
from prometheus_client.multiprocess import mark_process_dead
from psycopg2.extensions import parse_dsn

chdir = str(Path(__file__).resolve().parent)
sys.path.insert(0, chdir)


def _forget_service(kept: str = "") -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "signup"]:
        if name != kept:
            del sys.modules[name]  # so that it is imported as it is on disk now


_forget_service()  # HUP reads this file again, and has the new workers run new code
from signup import database, logs, metrics, slots  # noqa: E402
from signup.config import Config, ConfigError  # noqa: E402

try:
    settings = Config.from_env()
except ConfigError as error:
    sys.exit(str(error))

bind = f"0.0.0.0:{settings.port}"
# A worker for each core, and at least 2, so that one can be replaced.
cores = len(os.sched_getaffinity(0))
workers = settings.web_concurrency or min(max(2, cores), settings.database_max_connections)
worker_class = "gevent"  # a greenlet for each connection; gthread and sync are exact as well
# Seconds. Longer than the proxy keeps its idle connections (nginx/nginx.conf: 5 s), so that the
# server never closes one just as the next request comes; a worker that ends waits for them.
keepalive = 10
# No request takes longer.
graceful_timeout = int(settings.database_pool_timeout + settings.database_statement_timeout) + 3
# Workers show here that they live; on a disk, a slow write would look like a hanging worker.
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
control_socket_disable = True  # its default path is one for all instances of a user
forwarder_headers = ""  # no header may replace the path that is matched and counted
logger_class = logs.GunicornLogger
loglevel = settings.log_level
access_log_format = "request"  # signup/logs.py adds the fields that are not personal
proc_name = "signup"


def nworkers_changed(server: Any, new_value: int, old_value: int | None) -> None:
    """The first hook that sees all settings: check them, before the first line in the log."""
    if old_value is not None:
        return
    if server.cfg.preload_app:
        sys.exit("preload_app is not supported: each worker makes its own metrics and connections")
    try:
        server.config = Config.from_env(os.environ | server.cfg.env)
        server.config.check(workers=new_value)
    except ConfigError as error:
        sys.exit(str(error))


def on_starting(server: Any) -> None:
    """Before the first worker: a metrics folder, and a database with its schema."""
    for number in (signal.SIGINT, signal.SIGTERM):  # until gunicorn sets its own handlers
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    try:
        parent = server.config.prometheus_multiproc_dir or worker_tmp_dir
        server.folder = slots.make_folder(parent)
        atexit.register(_clean_up, server)  # on_exit would miss an exit during the start
        database.create_schema(server.config)
    except OSError as error:
        sys.exit(f"PROMETHEUS_MULTIPROC_DIR: {error}")
    except database.Unavailable as error:
        sys.exit(str(error))


def when_ready(server: Any) -> None:
    """Say where the service is, and its database."""
    url = parse_dsn(server.config.database_url)
    address = str(server.LISTENERS[0]).replace("0.0.0.0", "localhost")
    name, host = url.get("dbname", ""), url.get("host", "localhost")
    print(f"signup service on {address}, database {name!r} on {host}", file=sys.stderr, flush=True)


def pre_fork(server: Any, worker: Any) -> None:
    """In the master: a slot for the new worker. Only reaped workers have left WORKERS."""
    live = [old.slot for old in sorted(server.WORKERS.values(), key=lambda old: -old.age)]
    budget = server.config.database_max_connections
    worker.slot = slots.Slot.choose(live, budget, server.cfg.workers, server.folder)
    try:
        if worker.slot.prepare((server.cfg.uid, server.cfg.gid)):
            server.starts = metrics.of_master(server.folder)
            if live:  # somebody removed the folder, and they count into files that nobody finds
                os.kill(os.getpid(), signal.SIGHUP)
    except OSError as error:  # the worker would die of it, and so would the next one
        raise HaltServer(f"PROMETHEUS_MULTIPROC_DIR: {error}", 1) from error
    server.starts.inc()


def post_fork(server: Any, worker: Any) -> None:
    """In the worker, before it loads the application."""
    # Until gunicorn sets the worker's handlers, the master's would swallow what ends a worker.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if server.cfg.reload:
        _forget_service(kept="signup.slots")
    slots.current = worker.slot


def post_worker_init(worker: Any) -> None:
    """In the worker, once it has loaded the application."""
    # gunicorn computes a setting at each look, and takes some thirty looks a request.
    vars(worker.cfg).update({name: each.get() for name, each in worker.cfg.settings.items()})


def worker_int(worker: Any) -> None:
    """In a worker that ends at once. Ctrl-C reaches it as well as its master, who ends it again."""
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, lambda *_: None)


def child_exit(server: Any, worker: Any) -> None:
    """In the master, once a worker is reaped, however it died."""
    mark_process_dead(worker.slot.number, str(server.folder))  # drops its live gauges


def _clean_up(server: Any) -> None:
    if os.getpid() == server.pid:  # and not a worker, which inherits this
        shutil.rmtree(server.folder, ignore_errors=True)
