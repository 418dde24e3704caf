"""System programs: find, start and stop them."""

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Self

from . import wait_until

# Debian packages, where their names are not those of the programs.
PACKAGES = {"promtool": "prometheus", "amtool": "prometheus-alertmanager", "ip": "iproute2"}
PATH = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"  # a user's PATH lacks sbin


def find_program(name: str) -> str | None:
    """Return the path of a program by its Debian name; upstream's lack `prometheus-`."""
    upstream = name.removeprefix("prometheus-").replace("-", "_")
    return shutil.which(name, path=PATH) or shutil.which(upstream)


def missing(*names: str) -> str:
    """Return which programs are missing and how to install them; empty if none is."""
    absent = [name for name in names if find_program(name) is None]
    packages = " ".join(sorted({PACKAGES.get(name, name) for name in absent}))
    return f"missing: {', '.join(absent)} (apt-get install {packages})" if absent else ""


def free_port() -> int:
    """Return a free port of 127.0.0.1, for a program that can't choose one.

    It is below Linux's ephemeral ports, so that it stays free for a restart.
    """
    while True:
        port = random.randrange(10_000, 32_768)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def listens(port: int) -> bool:
    """Return whether a program accepts connections on `port` of 127.0.0.1."""
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Program(ABC):
    """A server on a free port of 127.0.0.1 and its temporary `folder`, for a `with` block."""

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="signup-test-", dir="/tmp"))
        self._log = self.folder / "log"
        try:
            self.start()
        except BaseException:
            shutil.rmtree(self.folder)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        shutil.rmtree(self.folder)

    @abstractmethod
    def command(self) -> list[str]:
        """Return the program's name and options."""

    def account(self) -> dict[str, Any]:
        """Return the subprocess options that run it as another user."""
        return {}

    @abstractmethod
    def address(self) -> str | None:
        """Return the URL once the program accepts connections, else None."""

    def start(self) -> None:
        name, *options = self.command()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [str(find_program(name)), *options],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                **self.account(),
            )
        try:
            self.url = wait_until(self._address)
        except BaseException:
            self.stop()
            raise

    def _address(self) -> str | None:
        assert self._process.poll() is None, self.log()
        return self.address()

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def stop(self, number: int = signal.SIGTERM) -> None:
        self.send_signal(number)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise

    def log(self) -> str:
        """Return the program's output since its last start."""
        return self._log.read_text()
