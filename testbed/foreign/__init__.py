"""A stranger's service under gunicorn, with a copy of slots.py or the library's own way."""

import re
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, Self

import requests

from .. import ROOT
from ..load import Background
from ..service import Samples, Service

STOCK = """\
from prometheus_client import multiprocess
def child_exit(server, worker):
    multiprocess.mark_process_dead(worker.pid)
"""  # as prometheus_client's manual says


class Foreign(Service):
    """The service in a temporary folder, which every user can read; `answers` are by master."""

    ready = r"Listening at: (http\S+) "
    text_format = "text/plain; version=1.0.0"
    workers, requests = "in_livesum", "hits_total"

    def __init__(self, *options: str, stock: bool = False, **env: Any) -> None:
        env["DATABASE_URL"] = "none"  # else Service starts a PostgreSQL
        # A worker that gets TERM while it starts ignores it, until gunicorn repeats it.
        super().__init__("--no-control-socket", "--graceful-timeout=3", *options, **env)
        self._stock = stock

    def __enter__(self) -> Self:
        folder = tempfile.TemporaryDirectory(prefix="foreign-", dir="/tmp")
        self.project = Path(self._outputs.enter_context(folder))
        self.project.chmod(0o755)
        conf = self.project / "gunicorn.conf.py"
        shutil.copy(Path(__file__).with_name("app.py"), self.project)
        if self._stock:
            conf.write_text(STOCK)
            (self.project / "metrics").mkdir()
        else:
            shutil.copy(ROOT / "signup" / "slots.py", self.project)
            conf.write_text("from slots import *\n")
        return super().__enter__()

    def masters(self) -> list[int]:
        """Return the process ids of all masters so far; USR2 adds one."""
        return [int(pid) for pid in re.findall(r"Listening at: \S+ \((\d+)\)", self.log())]

    def metrics_folder(self) -> Path:
        return self.project / self.get("/folder").text

    def metrics(self, openmetrics: bool = False) -> Samples:
        return super().metrics()  # the only format

    def hit(self, path: str) -> None:
        response = self.get(path)
        response.raise_for_status()
        with self._lock:
            self.answers[int(response.text)] += 1

    def check(self, unanswered: int = 0) -> None:
        """Compare the newest master's counters with the answers; `unanswered` may be counted."""
        now, answered = self.metrics(), self.answers[self.masters()[-1]]
        for name in ("hits_total", "requests_total", "durations_count", "sizes_count"):
            assert answered <= now.total(name) <= answered + unanswered, name


class Hits(Background):
    """Requests to both paths in turn, over new connections."""

    def __init__(self, service: Foreign, clients: int) -> None:
        super().__init__(clients)
        self._service = service
        self.unanswered: Counter[str] = Counter()

    def step(self, session: requests.Session, number: int, turn: int) -> None:
        try:
            self._service.hit(("/a", "/b")[turn % 2])
        except (requests.RequestException, ValueError) as error:  # QUIT cuts responses short
            self.unanswered[repr(error)] += 1
