"""Worker slots: prometheus_client's multiprocess mode in files that workers take over.

The library keeps files for each process id for good: with each new worker the folder and the scrape
grow (client_python issues 275, 367, 568). Here a worker takes the lowest number that no live one
holds, and its counters go on. The master gives it out once its holder is reaped: none is shared.
"""

import os
import shutil
import tempfile
from collections.abc import Set
from pathlib import Path
from typing import NamedTuple

import psutil
from prometheus_client import values

MASTER = "master"  # instead of a slot's number, in the names of the master's files
MASTER_FILES = (f"counter_{MASTER}.db", f"gauge_max_{MASTER}.db")
FILES = ("counter_{}.db", "histogram_{}.db", "gauge_livesum_{}.db")  # of a slot
FILE_SIZE = 65536  # bytes; a worker's metrics take a fifth of it


class Slot(NamedTuple):
    """What the master gives to a new worker."""

    number: int
    connections: int  # its share of DATABASE_MAX_CONNECTIONS
    folder: str  # of the metrics

    @classmethod
    def choose(cls, taken: Set[int], budget: int, workers: int, folder: str) -> "Slot":
        """The lowest slot that is not `taken`; `workers` of them never exceed the `budget`."""
        number = min(set(range(len(taken) + 1)) - taken)
        return cls(number, max(1, budget // workers + (number < budget % workers)), folder)

    def prepare(self, user: int, group: int) -> bool:
        """Make the files that are missing; whether all were. Raises OSError."""
        folder = Path(self.folder)
        missing = not (folder / MASTER_FILES[0]).exists()
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, user, group)
        for name in (*MASTER_FILES, *(file.format(self.number) for file in FILES)):
            if not (folder / name).exists():
                with (folder / "new").open("wb") as new:
                    os.posix_fallocate(new.fileno(), 0, FILE_SIZE)  # no room later is a SIGBUS
                    os.chown(new.fileno(), user, group)
                (folder / "new").rename(folder / name)  # whole, when a scrape finds it
        return missing


def make_folder(parent: str | None) -> str:
    """A new folder for this master; those of killed ones go. Raises OSError."""
    place = Path(parent or tempfile.gettempdir())
    place.mkdir(parents=True, exist_ok=True)
    prefix = f"signup-slots-{Path('/proc/self/ns/pid').stat().st_ino}-"  # containers may share it
    for folder in place.glob(f"{prefix}*"):
        if not psutil.pid_exists(int(folder.name.split("-")[3])):
            shutil.rmtree(folder, ignore_errors=True)
    return tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=place.resolve())


def write_as(name: int | str, folder: str) -> None:
    """From now on, new metrics of this process go into the files of `name` in `folder`."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
    values.ValueClass = values.MultiProcessValue(process_identifier=lambda: name)
