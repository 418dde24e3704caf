"""For benchmarks/soak.py: the service, but with the library's own way of keeping metrics."""

import os
import runpy
from pathlib import Path
from typing import Any

from signup import slots

ours = runpy.run_path(str(Path(__file__).parent.parent / "gunicorn.conf.py"))
globals().update({name: value for name, value in ours.items() if not name.startswith("__")})


def post_fork(server: Any, worker: Any) -> None:
    worker.slot = os.getpid()
    ours["post_fork"](server, worker)


def child_exit(server: Any, worker: Any) -> None:
    slots.release(worker.pid, Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))
