"""The process metrics of the whole service, which prometheus_client's multiprocess mode lacks.

Read from /proc when a scrape asks: man page proc(5). Names as in Prometheus' client guidelines.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from time import sleep
from typing import NamedTuple

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PROC = Path("/proc")
TICKS = os.sysconf("SC_CLK_TCK")  # a second
PAGE = os.sysconf("SC_PAGE_SIZE")  # bytes
FORKED_WITHOUT_EXEC = 0x40  # PF_FORKNOEXEC of the kernel's sched.h


class Stat(NamedTuple):
    """What is needed of /proc/PID/stat."""

    state: str
    flags: int
    cpu: int  # ticks
    reaped_cpu: int  # ticks, of the children that it waited for
    start: int  # ticks since boot
    resident: int  # pages

    @classmethod
    def read(cls, pid: int) -> "Stat":
        # The second field is the program's name in brackets, and may hold anything.
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        numbers = [0, *map(int, fields[1:])]
        return cls(
            state=fields[0],
            flags=numbers[6],
            cpu=numbers[11] + numbers[12],
            reaped_cpu=numbers[13] + numbers[14],
            start=numbers[19],
            resident=numbers[21],
        )


class ProcessCollector(Collector):
    """A gunicorn master and its workers, or, without `master`, this process alone."""

    def __init__(self, master: int | None) -> None:
        self._master = master or os.getpid()
        self._has_workers = master is not None
        self._boot_time = _boot_time()

    def collect(self) -> Iterable[Metric]:
        master, workers = self._snapshot()
        cpu = master.cpu + master.reaped_cpu + sum(worker.cpu for worker in workers.values())
        resident = master.resident + sum(worker.resident for worker in workers.values())
        yield CounterMetricFamily(
            "process_cpu_seconds",
            "CPU time of the master and all workers, ended ones included, in seconds",
            cpu / TICKS,
        )
        yield GaugeMetricFamily(
            "process_resident_memory_bytes",
            "Resident memory of master and workers in bytes; a shared page counts in each",
            resident * PAGE,
        )
        yield GaugeMetricFamily(
            "process_open_fds",
            "Open file descriptors of the master and the live workers",
            sum(_count_files(pid) for pid in (self._master, *workers)),
        )
        yield GaugeMetricFamily(
            "process_start_time_seconds",
            "Start of the master in seconds since the Unix epoch",
            self._boot_time + master.start / TICKS,
        )
        if self._has_workers:
            yield GaugeMetricFamily("signup_workers", "Live workers", len(workers))

    def _snapshot(self) -> tuple[Stat, dict[int, Stat]]:
        """The master and its live or dying workers, as they were at one moment.

        A worker's CPU time goes over to its master when it is reaped: counted in neither or in
        both, it would make the total jump. So it is read again until nothing went over meanwhile.
        """
        children: dict[int, Stat] = {}
        for _ in range(100):
            master, pids = Stat.read(self._master), self._children()
            try:
                children = {pid: Stat.read(pid) for pid in pids}
            except (FileNotFoundError, ProcessLookupError):
                continue
            being_reaped = any(child.state == "X" for child in children.values())
            moved = Stat.read(self._master).reaped_cpu != master.reaped_cpu
            if not (being_reaped or moved or self._children() != pids):
                break
            sleep(0.0005)
        # A master that USR2 has started is a child as well, but not a worker.
        workers = {p: c for p, c in children.items() if c.flags & FORKED_WITHOUT_EXEC}
        return master, workers

    def _children(self) -> list[int]:
        if not self._has_workers:
            return []
        master = str(self._master)
        return [int(p) for p in (PROC / master / "task" / master / "children").read_text().split()]


def _count_files(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 (names are enough)
    except OSError:  # it has ended since
        return 0


def _boot_time() -> int:
    for line in (PROC / "stat").read_text().splitlines():
        if line.startswith("btime "):
            return int(line.split()[1])
    return 0
