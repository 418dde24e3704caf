"""For drills/soak.py: the service with the library's default, a file set per process id."""

import os
import runpy
from pathlib import Path
from typing import Any

from prometheus_client.multiprocess import mark_process_dead

ours = runpy.run_path(str(Path(__file__).parent.parent / "gunicorn.conf.py"))
globals().update({name: value for name, value in ours.items() if not name.startswith("__")})


def post_fork(server: Any, worker: Any) -> None:
    worker.slot = worker.slot._replace(number=os.getpid())
    ours["post_fork"](server, worker)


def child_exit(server: Any, worker: Any) -> None:
    mark_process_dead(worker.pid, str(server.folder))
