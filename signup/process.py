"""The process metrics of the whole service, which prometheus_client's multiprocess mode lacks."""

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


class ProcessCollector(Collector):
    """This worker's gunicorn master and all its workers, whose metrics are in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._master = folder, psutil.Process(os.getppid())

    def collect(self) -> Iterable[Metric]:
        """Raises RuntimeError when a live worker has no file, so that a scrape would miss it."""
        files = self._live_files()
        cpu, workers = self._snapshot()
        if len(files | self._live_files()) < len(workers):
            raise RuntimeError(f"somebody has removed metrics from {self._folder}")
        memory = descriptors = 0
        for process in (self._master, *workers):
            with suppress(psutil.Error):  # it has ended since, or is another user's (--user)
                memory += process.memory_info().rss
                descriptors += process.num_fds()
        text = "CPU time of the master and all workers, ended ones included, in seconds"
        yield CounterMetricFamily("process_cpu_seconds", text, cpu)
        text = "Resident memory of master and workers in bytes; a shared page counts in each"
        yield GaugeMetricFamily("process_resident_memory_bytes", text, memory)
        text = "Open file descriptors of the master and the live workers"
        yield GaugeMetricFamily("process_open_fds", text, descriptors)
        yield GaugeMetricFamily("signup_workers", "Live workers", len(workers))

    def _live_files(self) -> set[str]:  # one for each worker, from before its fork on
        return {file.name for file in self._folder.glob("gauge_livesum_*.db")}

    def _snapshot(self) -> tuple[float, list[psutil.Process]]:
        # A worker's CPU time goes over to its master when it is reaped: counted in neither or in
        # both, it would make the total jump. So all is read again if one was reaped meanwhile.
        for _ in range(100):
            own = self._master.cpu_times()[:4]  # user, system, and those of reaped children
            with suppress(psutil.NoSuchProcess):
                workers = self._workers()
                cpu = sum(own) + sum(sum(worker.cpu_times()[:2]) for worker in workers)
                reaping = any(worker.status() == psutil.STATUS_DEAD for worker in workers)
                if not reaping and self._master.cpu_times()[2:4] == own[2:]:
                    return cpu, workers
            time.sleep(0.0005)
        raise RuntimeError("workers end faster than they can be counted")

    def _workers(self) -> list[psutil.Process]:
        pid = self._master.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        workers = []
        for child in map(psutil.Process, map(int, children)):
            with suppress(psutil.AccessDenied):  # of a worker with --user
                if child.environ().get("GUNICORN_PID") == str(pid):
                    continue  # after USR2 the next master is a child as well
            workers.append(child)
        return workers
