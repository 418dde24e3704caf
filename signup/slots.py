"""Worker slots: prometheus_client's multiprocess mode in files that workers take over.

The library keeps one set of files for each process id and never drops the dead ones, so with
worker recycling the folder and the scrape grow without bound (client_python issues 275, 367, 568).
Here each worker writes under the lowest slot number that no live worker holds: the next holder of
a slot goes on from where the counters stood, and the folder is as large as the largest number of
workers that ever lived at once needs. The gunicorn master alone gives out slots, and it reaps a
worker before it gives the slot away, so two live workers never share a file.
"""

import fcntl
import functools
import json
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import prometheus_client.values
from prometheus_client.metrics_core import Metric
from prometheus_client.mmap_dict import _read_all_values
from prometheus_client.multiprocess import mark_process_dead
from prometheus_client.registry import Collector
from prometheus_client.values import MultiProcessValue

PREFIX = "signup-metrics-"
NEW = ".new"

DOUBLE = 8  # bytes

Key = tuple[str, str]  # of a value: its metric's type, and what the library calls its key

current: int | None = None  # this process's slot, if it is a gunicorn worker


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
                named, self._lock = _private_folder()
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


def _private_folder() -> tuple[Path, int | None]:
    """A new folder, locked; the folders of masters that were killed are removed."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else tempfile.gettempdir()
    for folder in Path(memory).glob(f"{PREFIX}*"):
        if folder.suffix != NEW and folder.stat().st_uid == os.geteuid():
            lock = _lock(folder)
            if lock is not None:
                shutil.rmtree(folder)
                os.close(lock)
    # It has its final name only once it is locked: until then it looks like a left-over.
    new = Path(tempfile.mkdtemp(prefix=PREFIX, suffix=NEW, dir=memory))
    lock = _lock(new)
    return new.rename(new.with_suffix("")), lock


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

    class Value(MultiProcessValue(process_identifier=lambda: slot)):  # type: ignore[misc]
        """The library's value, without its lock and its look at the process id.

        The greenlets of a worker take turns only where they wait, and its slot never changes.
        """

        _value: float

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._cells = memoryview(self._file._m).cast("d")
            self._cell = self._file._positions[self._key] // DOUBLE

        def inc(self, amount: float) -> None:
            self._value = self._cells[self._cell] = self._value + amount

    prometheus_client.values.ValueClass = Value


def master() -> int | None:
    """The process id of this worker's gunicorn master, if it is one."""
    return None if current is None else os.getppid()


def release(slot: int, folder: Path) -> None:
    """In the master, once a worker is reaped: drop its live gauges, keep its counters."""
    mark_process_dead(slot, str(folder))


class SlotCollector(Collector):
    """The metrics of all slots; each scrape reads the files anew.

    Every metric of ours is a sum over the workers: counters, histograms and gauges of mode livesum.
    Adding up before parsing does a scrape in half the time of the library's MultiProcessCollector,
    which knows all modes, and fails on a file that a starting worker has not sized yet.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Where in a file which value is: files only grow, so by name and size a scrape that has
        # seen one knows it, and needs to read no more than numbers.
        self._layouts: dict[tuple[str, int], list[tuple[Key, int]]] = {}

    def collect(self) -> Iterable[Metric]:
        totals: dict[Key, float] = {}
        for file in self._folder.glob("*.db"):
            try:
                data = _used(file)
                layout = self._layouts.get((file.name, len(data)))
                if layout is None:
                    layout = self._layouts[file.name, len(data)] = _layout(file, data)
            except (FileNotFoundError, struct.error):
                # Dropped since the listing with its worker; or just made, and not sized yet.
                continue
            cells = memoryview(data).cast("d")
            for key, cell in layout:
                totals[key] = totals.get(key, 0.0) + cells[cell]

        families: dict[str, Metric] = {}
        count = 0.0
        for (kind, described), value in totals.items():
            name, sample, labels, help_text = _parse(described)
            family = families.get(name)
            if family is None:
                family = families[name] = Metric(name, help_text, kind)
            if "le" not in labels:
                family.add_sample(sample, labels, value)
                continue
            # A file has each bucket's own count, in ascending order; Prometheus wants the sum.
            count += value
            family.add_sample(sample, labels, count)
            if labels["le"] == "+Inf":
                without_le = {label: text for label, text in labels.items() if label != "le"}
                family.add_sample(f"{name}_count", without_le, count)
                count = 0.0
        return families.values()


def _used(file: Path) -> bytes:
    """What of a file is in use, as its first four bytes say."""
    with file.open("rb") as opened:
        data = opened.read(mmap.PAGESIZE)
        (used,) = struct.unpack_from("i", data)
        return data[:used] if used <= len(data) else data + opened.read(used - len(data))


def _layout(file: Path, data: bytes) -> list[tuple[Key, int]]:
    kind = file.name.partition("_")[0]
    values = _read_all_values(data, len(data))
    return [((kind, key), position // DOUBLE) for key, _, _, position in values]


@functools.cache  # of a fixed set of keys
def _parse(key: str) -> tuple[str, str, dict[str, str], str]:
    name, sample, labels, help_text = json.loads(key)
    return name, sample, labels, help_text
