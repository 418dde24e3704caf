"""prometheus_client's multiprocess mode under gunicorn, exact and with a bounded number of files.

The library keeps a set of files for each process id, for ever (client_python issues 275, 367, 568).
Here a worker continues the set of the lowest slot that no live worker holds. It is in use with
`from slots import *` at the start of any service's gunicorn.conf.py; docs/slots.md says more.
"""

import atexit
import fcntl
import glob
import os
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO
from weakref import WeakKeyDictionary

from prometheus_client import values
from prometheus_client.multiprocess import mark_process_dead

__all__ = ["child_exit", "post_fork", "pre_fork"]  # hooks of your own must call these

VARIABLE, LOCK, PREFIX = "PROMETHEUS_MULTIPROC_DIR", "lock", "prometheus-slots-"
MODES = ("all", "min", "max", "sum", "mostrecent")
KINDS = ["counter", "histogram", "summary"]  # each process has one file of each
KINDS += [f"gauge_{live}{mode}" for live in ("", "live") for mode in MODES]
FILE_SIZE = 32768  # bytes; the library doubles a file that is full

folder: Path
numbers: "WeakKeyDictionary[Any, int]" = WeakKeyDictionary()  # the slot of each gunicorn worker
_lock: TextIO
_given = os.environ.get(VARIABLE)  # where to create the folder
_name: int | str = "master"  # of this process's files
master = os.getpid()  # after the first fork, the process id of the daemon


def _make_folder() -> None:
    """Create and lock `folder`; remove those of killed masters. Raises OSError."""
    global folder, _lock
    default = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else tempfile.gettempdir()
    place = Path(_given or default).resolve()
    if glob.escape(str(place)) != str(place):  # the library would take [1] in it for a pattern
        place = Path(default)
    place.mkdir(parents=True, exist_ok=True)
    for old in place.glob(f"{PREFIX}*"):
        with suppress(OSError):  # not one of ours, or its master lives
            if old.lstat().st_uid == os.geteuid():
                with (old / LOCK).open() as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(old)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
    fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH)  # systemd-tmpfiles spares it
    _lock = (folder / "new").open("x")
    fcntl.flock(_lock, fcntl.LOCK_EX)  # the kernel ends it with this process, whatever kills that
    (folder / "new").rename(folder / LOCK)  # which nobody sees unlocked


def _create_files(name: int | str, user: int, group: int) -> None:
    """Create a slot's missing files. Raises OSError."""
    for kind in KINDS:
        path, start = folder / f"{kind}_{name}.db", folder / f"{kind}_master"
        if not path.exists():
            with (folder / "new").open("xb") as new:
                # Write all of it now: on a full disk, the library's write would be a SIGBUS.
                new.write(start.read_bytes() if start.exists() else bytes(FILE_SIZE))
                os.fchown(new.fileno(), user, group)
            (folder / "new").rename(path)  # a scrape never meets a partial file


def pre_fork(server: Any, worker: Any) -> None:
    """In the master: give the worker a slot. If its files can't be created, the service stops."""
    global master
    master = server.pid
    taken = {numbers.get(other, -1) for other in server.WORKERS.values()}
    numbers[worker] = number = min(set(range(len(taken) + 1)) - taken)
    os.environ.pop(VARIABLE, None)  # the master's environment is as it was: USR2 passes it on
    if _given is not None:
        os.environ[VARIABLE] = _given
    try:
        if VARIABLE in server.cfg.env:  # it would replace the workers' folder
            raise OSError("set it in the environment, not with --env")
        if not (folder / LOCK).exists():  # deleted: replace the workers that write to its files
            shutil.rmtree(folder, ignore_errors=True)
            _make_folder()
            if taken:
                os.kill(os.getpid(), signal.SIGHUP)
        os.chown(folder, -1, server.cfg.gid)
        folder.chmod(0o750)  # with --user, workers own their files, and can't lay others here
        for file in folder.glob("*_master.db"):  # of a preloaded application
            os.chown(file, server.cfg.uid, server.cfg.gid)
            if file.name.startswith("gauge"):  # each worker starts with its values, from a copy
                file.rename(file.with_suffix(""))
        mark_process_dead(number, str(folder))
        _create_files(number, server.cfg.uid, server.cfg.gid)
    except OSError as error:  # this worker and every replacement would fail
        server.halt(reason=f"{VARIABLE}: {error}", exit_status=1)


def post_fork(server: Any, worker: Any) -> None:
    """In the worker: write to its slot's files from here on."""
    global _name
    _name = numbers[worker]
    os.environ[VARIABLE] = str(folder)
    _lock.close()


def child_exit(server: Any, worker: Any) -> None:
    """In the master, once a worker is reaped, however it died: remove its live gauges."""
    mark_process_dead(numbers.get(worker, -1), str(folder))


try:
    _make_folder()
    atexit.register(lambda: shutil.rmtree(folder, True) if master == os.getpid() else None)
    _create_files(_name, -1, -1)
except OSError as error:
    sys.exit(f"{VARIABLE}: {error}")
os.environ[VARIABLE] = str(folder)  # a preloaded application creates its metrics before the forks
values.ValueClass = values.MultiProcessValue(process_identifier=lambda: _name)
