"""What prometheus_client's manual says for gunicorn, for a comparison with slots.py."""

from typing import Any

from prometheus_client import multiprocess


def child_exit(server: Any, worker: Any) -> None:
    multiprocess.mark_process_dead(worker.pid)
