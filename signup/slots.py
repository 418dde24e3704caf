"""Worker slots: prometheus_client's multiprocess mode in files that workers take over.

The library keeps a set of files for each process id and never drops the dead ones, so with worker
recycling the folder and the scrape grow without bound (client_python issues 275, 367, 568). Here
each worker writes under the lowest slot number that no live worker holds: the next holder of a
slot goes on from where its counters stood. The gunicorn master alone gives out slots, and it reaps
a worker before it gives its slot away, so two live processes never share a file.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
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
    folder: Path  # of the metrics

    @classmethod
    def choose(cls, live: Sequence["Slot"], budget: int, workers: int, folder: Path) -> "Slot":
        """The slot of a new worker beside those `live`, the newest first.

        It and the newest `workers` - 1 have the `budget` of connections; the others are about to
        be replaced, or more than were asked for.
        """
        taken = {slot.number for slot in live}
        peers = [slot.connections for slot in live[: workers - 1]]
        left, missing = budget - sum(peers), workers - len(peers)
        number = next(number for number in range(len(taken) + 1) if number not in taken)
        return cls(number, max(1, -(-left // missing)), folder)

    def prepare(self, owner: tuple[int, int]) -> bool:
        """Make its files and the master's, for `owner`'s user and group; whether all were missing.

        With their pages, since writing to a mapped file is a SIGBUS when there is no room for one;
        and under another name until they are whole, since a scrape may come any time.
        Raises OSError.
        """
        missing = not (self.folder / MASTER_FILES[0]).exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        os.chown(self.folder, *owner)
        for name in (*MASTER_FILES, *(file.format(self.number) for file in FILES)):
            if not (self.folder / name).exists():
                with (self.folder / "new").open("wb") as new:
                    os.posix_fallocate(new.fileno(), 0, FILE_SIZE)
                    os.chown(new.fileno(), *owner)
                (self.folder / "new").rename(self.folder / name)
        return missing


current: Slot | None = None  # this process's, if it is a gunicorn worker


def make_folder(parent: str | None) -> Path:
    """A new folder for the metrics of this master, without those of masters that were killed.

    In the folder for temporary files where no `parent` is given. Raises OSError.
    """
    place = Path(parent or tempfile.gettempdir())
    place.mkdir(parents=True, exist_ok=True)
    prefix = f"signup-slots-{Path('/proc/self/ns/pid').stat().st_ino}-"  # containers may share it
    for folder in place.glob(f"{prefix}*"):
        if not psutil.pid_exists(int(folder.name.split("-")[3])):
            shutil.rmtree(folder, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=place)).resolve()


def write_as(name: int | str, folder: Path) -> None:
    """From now on, new metrics of this process go into the files of `name` in `folder`."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    values.ValueClass = values.MultiProcessValue(process_identifier=lambda: name)
