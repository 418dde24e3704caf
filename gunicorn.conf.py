"""gunicorn's settings, then its hooks. From another folder, pass this file with --config."""

import atexit
import os
import signal
import ssl
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from gevent.hub import Hub
from prometheus_client import Counter

chdir = str(Path(__file__).resolve().parent)
sys.path.insert(0, chdir)
from signup import database, logs, slots  # noqa: E402
from signup.config import Config, ConfigError  # noqa: E402

# After HUP, workers must import the code on disk, not inherit this. Slots holds the master's state.
for name in [n for n in sys.modules if n.split(".")[0] == "signup" and n != "signup.slots"]:
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
# Else gevent prints a traceback for each failed TLS handshake. (HUP runs this file again.)
Hub.NOT_ERROR = tuple({*Hub.NOT_ERROR, ssl.SSLError, ConnectionError})
logger_class = logs.GunicornLogger
loglevel = settings.log_level
# JSON without personal data. The access log is off unless `accesslog` is set.
access_log_format = (
    '{"time": "%(t)s", "method": "%({signup.method}e)s", "path": "%({signup.path}e)s", '
    '"status": %(s)s, "duration": %(L)s, "request_id": "%({signup.request_id}e)s"}'
)
UNSUPPORTED = "control_socket", "control_socket_mode", "dirty_apps", "statsd_host", "syslog_prefix"


def on_starting(server: Any) -> None:
    """In the master, before the first fork: check the settings, and create the table."""
    if pidfile := server.pidfile:  # gunicorn leaves it behind if a start fails
        atexit.register(lambda: server.pid == os.getpid() and pidfile.unlink())
    slots.master = server.pid  # with --daemon, not that of the import
    ends = signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM  # without a traceback
    for number in (*ends, signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, _: number in ends and sys.exit(128 + number))
    try:
        for name in UNSUPPORTED:
            if (setting := server.cfg.settings[name]).get() != setting.default:
                raise ConfigError(f"gunicorn's setting {name} is not supported")
        checked = Config.from_env(os.environ | server.cfg.env, server.cfg.workers)
        if os.geteuid() == 0 != server.cfg.uid:  # --user: try with the files that workers can read
            os.environ.pop("HOME", None)  # libpq then takes the home of the effective user
            os.seteuid(server.cfg.uid)
        say = cache(server.log.error)  # each cause once
        while cause := database.prepare_table(checked):  # a supervisor would wait ever longer
            say(f"the database can't be reached: {cause}; trying again each second")
            time.sleep(1)
    except ConfigError as error:
        if server.cfg.errorlog != "-":  # with --daemon, standard error is closed
            server.log.error("%s", error)
        raise
    finally:
        os.seteuid(os.getuid())


def when_ready(server: Any) -> None:
    """Print the service's address and number of workers."""
    place = str(server.LISTENERS[0]) if server.LISTENERS else f"http://{server.cfg.bind[0]}"
    address = place.replace("0.0.0.0", "localhost")  # reuse_port: each worker has its listener
    with suppress(OSError):  # a full disk
        print(f"signup service on {address}, {server.num_workers} workers", file=sys.stderr)


pre_fork, child_exit = slots.pre_fork, slots.child_exit


def post_fork(server: Any, worker: Any) -> None:
    """In the worker, before it loads the application."""
    # Until gunicorn installs the worker's handlers, the master's would swallow these signals.
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ctrl-C reaches only the master, which stops its workers
    slots.post_fork(server, worker)
    Counter("signup_worker_starts_total", "Workers started", registry=None).inc()
    budget = Config.from_env(os.environ | server.cfg.env).database_max_connections
    share, rest = divmod(budget, server.cfg.workers)  # the first slots share the rest
    os.environ["SIGNUP_CONNECTIONS"] = str(max(1, share + (slots.numbers[worker] < rest)))


def post_worker_init(worker: Any) -> None:
    """Cache settings, which gunicorn computes 30 times per request: 5 to 8 % of a signup's CPU."""
    vars(worker.cfg).update({name: each.get() for name, each in worker.cfg.settings.items()})


def pre_request(worker: Any, request: Any) -> None:
    """Ignore Upgrade, as HTTP allows: werkzeug would look for a WebSocket's route."""
    request.headers = [header for header in request.headers if header[0] != "UPGRADE"]
