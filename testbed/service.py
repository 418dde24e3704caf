"""The service under gunicorn, and an HTTP client for it."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, Self
from urllib.parse import urlsplit

import psutil
import requests
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from . import ROOT, wait_until
from .postgres import home_for
from .programs import is_alive

GUNICORN = (sys.executable, str(Path(sys.executable).with_name("gunicorn")))
OPENMETRICS = "application/openmetrics-text; version=1.0.0"
CLOSE = {"Connection": "close"}  # a stopping worker waits for keep-alive connections
USER = {"email": "ada@example.com", "first_name": "Ada", "last_name": "Lovelace"}


def user(name: str) -> dict[str, str]:
    """Return a signup body whose email contains `name`."""
    return USER | {"email": f"{name}@example.com"}


def refused_start(*options: str, folder: Path = ROOT, **env: str) -> CompletedProcess[str]:
    """Start gunicorn in `folder` with the variables `env` alone; it must refuse to start."""
    command = [*GUNICORN, "--bind=127.0.0.1:0", *options, "app:app"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode
    return done


class Samples(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """One scrape: the value of each sample by name and labels."""

    def get_value(self, name: str, **labels: str) -> float:
        return self[name, frozenset(labels.items())]

    def total(self, name: str, **labels: str) -> float:
        """Return the sum over all samples of `name` that have `labels`."""
        wanted = frozenset(labels.items())
        return sum(value for (n, have), value in self.items() if n == name and wanted <= have)


class Client:
    """An HTTP client of the service at `url`; `answers` counts the statuses of /signup."""

    url: str
    text_format = "text/plain; version=0.0.4"

    def __init__(self) -> None:
        self.answers: Counter[int] = Counter()
        self._lock = threading.Lock()

    def connect(self) -> socket.socket:
        """Open a connection, for requests that are not sent by an HTTP client."""
        address = urlsplit(self.url)
        return socket.create_connection((str(address.hostname), address.port or 80), timeout=30)

    def get(self, path: str, **options: Any) -> requests.Response:
        options["headers"] = CLOSE | options.get("headers", {})
        return requests.get(self.url + path, timeout=30, **options)

    def signup(self, method: str = "POST", **options: Any) -> requests.Response:
        """Send a request to /signup; a `session` keeps its connection alive."""
        session = options.pop("session", None)
        if session is None:
            session, options["headers"] = requests, CLOSE | options.get("headers", {})
        response: requests.Response = session.request(
            method, self.url + "/signup", timeout=30, **options
        )
        with self._lock:
            self.answers[response.status_code] += 1
        return response

    def metrics(self, openmetrics: bool = False) -> Samples:
        """Scrape over a new connection, so any worker may respond, and parse the exposition."""
        response = self.get("/metrics", headers={"Accept": OPENMETRICS} if openmetrics else {})
        response.raise_for_status()
        assert response.headers["Content-Type"].startswith(
            "application/openmetrics-text" if openmetrics else self.text_format
        )
        families = (parse_openmetrics if openmetrics else parse_text)(response.text)
        return Samples(
            ((sample.name, frozenset(sample.labels.items())), sample.value)
            for family in families
            for sample in family.samples
        )

    def first_scrape(self, condition: Callable[[Samples], bool]) -> Samples:
        """Return the first scrape that meets `condition`."""

        def scrape() -> Samples | None:
            now = self.metrics()
            return now if condition(now) else None

        return wait_until(scrape)

    def wait_for(self, **values: float) -> Samples:
        """Return the first scrape in which these metrics without labels have these values."""
        return self.first_scrape(lambda now: all(now.get_value(n) == values[n] for n in values))

    def quiet_metrics(self) -> Samples:
        """Return the first scrape with no request in flight and no connection in use."""
        return self.first_scrape(
            lambda now: (
                now.total("signup_requests_in_flight") == 0
                and now.total("database_connections", state="in_use") == 0
            )
        )

    def check_equalities(self, rows: int) -> None:
        """Check what docs/metrics.md says always holds; `rows` is the number of rows in `users`."""
        now = self.quiet_metrics()

        def requests_with(*codes: int) -> float:
            return sum(now.total("signup_requests_total", status_code=str(c)) for c in codes)

        def errors(kind: str) -> float:
            return now.get_value("signup_errors_total", error_type=kind)

        for status in {*self.answers, 201, 400, 405, 409, 413, 500, 503}:
            assert requests_with(status) == self.answers[status], status
        total = self.answers.total()
        assert now.total("signup_requests_total") == total
        assert now.total("signup_request_duration_seconds_count") == total
        assert requests_with(201) == rows
        assert requests_with(409) == errors("duplicate_email")
        assert requests_with(409) == now.get_value("signup_duplicate_email_attempts_total")
        failed = sum(n for status, n in self.answers.items() if status >= 400)
        assert now.total("signup_errors_total") == failed
        assert errors("validation") == now.total("signup_validation_errors_total")
        assert errors("validation") + errors("invalid_json") == requests_with(400, 413)
        assert errors("database") + errors("internal") == requests_with(500, 503)
        assert errors("invalid_method") == requests_with(405)
        open_, in_use, idle = (
            now.get_value("database_connections", state=s) for s in ("open", "in_use", "idle")
        )
        assert open_ == in_use + idle <= now.get_value("database_connections_max")


class Service(Client):
    """The service under gunicorn on 127.0.0.1, by default on a free port, for a `with` block.

    `options` are gunicorn's, `env` the service's variables.
    Without a DATABASE_URL, it starts as `make run` does.
    """

    ready = r"signup service on (http\S+),"  # in the log
    workers, requests = "signup_workers", "signup_requests_total"  # metrics

    def __init__(self, *options: str, project: Path = ROOT, port: int = 0, **env: str) -> None:
        super().__init__()
        self._command = [*GUNICORN, f"--bind=127.0.0.1:{port}", *options, "app:app"]
        if "DATABASE_URL" not in env:
            self._command = [sys.executable, "-m", "testbed.postgres", *self._command]
        self.project = project
        self._env = os.environ | env
        self._outputs = contextlib.ExitStack()  # one per start: a killed service may start again

    def __enter__(self) -> Self:
        self._output = self._outputs.enter_context(
            tempfile.NamedTemporaryFile("w+", prefix="signup-test-", suffix=".log")
        )
        self.process = subprocess.Popen(
            self._command,
            cwd=self.project,
            env=self._env,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self.url = wait_until(self._address)
            self.get("/healthz")  # returns once a worker accepts
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.stop(signal.SIGINT)  # TERM takes a second longer
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._outputs.close()

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal to the master and return its exit status."""
        self.process.send_signal(number)
        return self.wait()

    def reload(self) -> None:
        """Send HUP to the master, and wait until the old workers have stopped."""
        old = self.worker_pids()
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: not any(map(is_alive, old)), timeout=40)

    def press_ctrl_c(self) -> int:
        """Send SIGINT as a terminal does, to every process, and return the exit status."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.wait()

    def wait(self) -> int:
        try:
            return self.process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL the master and its workers at once; they are not in one process group."""
        processes = [psutil.Process(self.process.pid)]
        processes += processes[0].children(recursive=True)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()

    def _address(self) -> str | None:
        assert self.process.poll() is None, self.log()
        found = re.search(self.ready, self.log())
        return found[1] if found else None

    def log(self) -> str:
        """Return the service's output so far."""
        return Path(self._output.name).read_text()

    def worker_pids(self) -> list[int]:
        master = self.process.pid
        return [int(p) for p in Path(f"/proc/{master}/task/{master}/children").read_text().split()]

    def boots(self) -> int:
        """Return how many workers the master has started so far."""
        return self.log().count("Booting worker")

    def metric_files(self, pid: int) -> set[Path]:
        """Return the metric files that the worker `pid` has open, except the master's."""
        files = set()
        with contextlib.suppress(FileNotFoundError, PermissionError):  # it has exited
            for link in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                    files.add(link.readlink())
        return {file for file in files if file.suffix == ".db" and "master" not in file.name}

    def metrics_folder(self) -> Path:
        """Return the folder of the workers' metric files."""
        files = wait_until(lambda: self.metric_files(self.worker_pids()[0]))
        return files.pop().parent


@contextlib.contextmanager
def project_copy() -> Iterator[Path]:
    """Copy the service to a home folder of mode 700; its data is removed after the block."""
    with tempfile.TemporaryDirectory(prefix="signup-home-", dir="/tmp") as home:
        project = Path(home) / "sign up ($HOME) \"#1'"
        project.mkdir()
        for name in ("app.py", "gunicorn.conf.py"):
            shutil.copy(ROOT / name, project)
        for folder in ("signup", "testbed"):
            shutil.copytree(ROOT / folder, project / folder)
        try:
            yield project
        finally:
            shutil.rmtree(home_for(project), ignore_errors=True)
