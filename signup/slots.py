"""Worker slots: prometheus_client's multiprocess mode, with files that new workers reuse.

The library keeps files for each process id, without bound (client_python issues 275, 367, 568).
Here a worker continues the counters of the lowest slot that no worker holds: none is shared.
"""

import os
import shutil
import tempfile
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

import psutil
from prometheus_client import values

MASTER_FILE = "counter_master.db"
FILES = ("counter_{}.db", "histogram_{}.db", "gauge_livesum_{}.db")  # of each slot
FILE_SIZE = 65536  # bytes; a worker's metrics fill a fifth of it


class Slot(NamedTuple):
    """What the master assigns to a new worker."""

    number: int
    connections: int  # its share of DATABASE_MAX_CONNECTIONS
    folder: str  # of the metrics files

    @classmethod
    def choose(cls, taken: Set[int], budget: int, workers: int, folder: str) -> "Slot":
        """Return the lowest slot not in `taken`. The first `workers` slots share the `budget`."""
        number = min(set(range(len(taken) + 1)) - taken)
        return cls(number, max(1, budget // workers + (number < budget % workers)), folder)

    def prepare(self, user: int, group: int) -> bool:
        """Create missing files; return whether the master's were among them. Raises OSError."""
        folder = Path(self.folder)
        missing = not (folder / MASTER_FILE).exists()
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, user, group)
        for name in (MASTER_FILE, *(file.format(self.number) for file in FILES)):
            if not (folder / name).exists():
                with (folder / "new").open("wb") as new:
                    os.posix_fallocate(new.fileno(), 0, FILE_SIZE)  # a full disk later is a SIGBUS
                    os.chown(new.fileno(), user, group)
                (folder / "new").rename(folder / name)  # a scrape never finds a partial file
        return missing


def make_folder(parent: str | None) -> str:
    """Create and return this master's folder; delete those of killed masters. Raises OSError."""
    place = Path(parent or tempfile.gettempdir())
    place.mkdir(parents=True, exist_ok=True)
    prefix = f"signup-slots-{Path('/proc/self/ns/pid').stat().st_ino}-"  # pids are per namespace
    for folder in place.glob(f"{prefix}*"):
        if not psutil.pid_exists(int(folder.name.split("-")[3])):
            shutil.rmtree(folder, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=place.resolve())


def write_as(name: int | str, folder: str) -> None:
    """Write metrics that this process creates from now on to the files of `name` in `folder`."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
    values.ValueClass = values.MultiProcessValue(process_identifier=lambda: name)
