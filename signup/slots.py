"""Worker slots: prometheus_client's multiprocess mode in files that workers take over.

The library keeps one set of files for each process id and never drops the dead ones, so with
worker recycling the folder and the scrape grow without bound (client_python issues 275, 367, 568).
Here each worker writes under the lowest slot number that no live worker holds: the next holder of
a slot goes on from where the counters stood, and the folder is as large as the largest number of
workers that ever lived at once needs. The gunicorn master alone gives out slots, and it reaps a
worker before it gives the slot away, so two live workers never share a file.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import prometheus_client.values
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

PREFIX = "signup-metrics-"

current = 0  # this process's slot


class FolderError(Exception):
    """The metrics folder can't be written; the message names it and says why."""


class Folder:
    """The folder of one gunicorn master's metrics, empty at first.

    `path` is the folder that the user names, of which only `*.db` files are removed. With None,
    or when another live master has that one, it is a private one, on memory-backed storage where
    there is some. Raises FolderError.
    """

    def __init__(self, named: Path | None) -> None:
        try:
            self._lock = named and _lock(named)
            self._private = self._lock is None
            if named is None or self._lock is None:
                memory = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
                named = Path(tempfile.mkdtemp(prefix=PREFIX, dir=memory))
                self._lock = _lock(named)
            self.path = named.resolve()
            tempfile.TemporaryFile(dir=self.path).close()  # to know now whether it can be written
            for file in self.path.glob("*.db"):
                file.unlink()
        except OSError as error:
            raise FolderError(
                f"PROMETHEUS_MULTIPROC_DIR: {str(named)!r} can't be written: {error.strerror}"
            ) from error

    def remove(self) -> None:
        """Leave nothing behind of a private folder."""
        if self._private:
            shutil.rmtree(self.path, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """Take `folder` for as long as this process lives; None when another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def lowest_free(taken: Iterable[int]) -> int:
    """The lowest slot number, from 0, that is not in `taken`."""
    slots = set(taken)
    return next(slot for slot in range(len(slots) + 1) if slot not in slots)


def use(slot: int) -> None:
    """In a new worker, before it makes its metrics: write them under `slot`."""
    global current
    current = slot
    prometheus_client.values.ValueClass = prometheus_client.values.MultiProcessValue(
        process_identifier=lambda: slot
    )


def release(slot: int, folder: Path) -> None:
    """In the master, once a worker is reaped: drop its live gauges, keep its counters."""
    mark_process_dead(slot, str(folder))


class SlotCollector(Collector):
    """The metrics of all slots, merged; each scrape reads the files anew."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def collect(self) -> Iterable[Metric]:
        # A worker that is just starting has made its file but not yet sized it: nothing in it.
        files = [entry.path for entry in os.scandir(self._folder) if _has_content(entry)]
        merged: Iterable[Metric] = MultiProcessCollector.merge(files)
        return merged


def _has_content(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.name.endswith(".db") and entry.stat().st_size > 0
    except FileNotFoundError:  # a live gauge, dropped since the listing
        return False
